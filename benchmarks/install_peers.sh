#!/usr/bin/env bash
# Install curvlinops 3.0.1 as a witness without the dependencies that would replace torch, and
# pytorch_optimizer 4.1.0 for the table of optimizers.
#
# A plain install pulls backpack-for-pytorch, which pulls torchvision and with it another
# torch. Only what curvlinops imports is installed here, each package without its own
# dependencies; the version of torch is compared before and after.
set -euo pipefail

python=${PYTHON:-python}
version() { "$python" -c 'import torch; print(torch.__version__)'; }

before=$(version)
"$python" -m pip install --quiet --no-deps \
    curvlinops-for-pytorch==3.0.1 \
    backpack-for-pytorch==1.7.1 \
    unfoldNd==0.2.3 \
    einops==0.8.1 \
    einconv==0.1.0 \
    linear_operator==0.6 \
    jaxtyping==0.3.2 \
    wadler-lindig==0.1.7 \
    pytorch_optimizer==4.1.0
after=$(version)
if [ "$before" != "$after" ]; then
    echo "torch changed from $before to $after: reinstall it" >&2
    exit 1
fi
"$python" -c 'import curvlinops' || { echo "curvlinops does not import" >&2; exit 1; }
"$python" -c 'import pytorch_optimizer' || { echo "pytorch_optimizer does not import" >&2; exit 1; }
echo "curvlinops 3.0.1 and pytorch_optimizer 4.1.0 installed beside torch $after"
