"""The comparison on images and names of emoji: its parts against oracles, and once in short."""

import hashlib
import importlib
import math
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sharpkit as sk
from sharpkit.optim import SAM, MongeSAM

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
alignment, emoji_pairs, two_modalities = map(
    importlib.import_module, ("alignment", "emoji_pairs", "two_modalities")
)
sys.path.remove(str(EXAMPLES))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def synthetic(n, seed=0):
    """Pairs of two linear views of the same latent numbers, the one as four patches of colour."""
    latent = normal(n, 6, seed=seed)
    patches = torch.sigmoid(latent @ normal(6, 12, seed=seed + 1)).reshape(n, 3, 2, 2)
    images = patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    features = latent @ normal(6, 10, seed=seed + 2)
    names = [f"{i}" for i in range(n)]
    return emoji_pairs.Pairs(images.float(), features.float(), names)


def brute(a, b, k):
    """Mutual nearest neighbours by sorting, one point at a time."""
    found = []
    for i in range(len(a)):
        sets = []
        for points in (a.numpy(), b.numpy()):
            cosines = [
                (p @ points[i]) / (np.linalg.norm(p) * np.linalg.norm(points[i])) for p in points
            ]
            others = [j for j in np.argsort(cosines)[::-1] if j != i]
            sets.append(set(others[:k]))
        found.append(len(sets[0] & sets[1]) / k)
    return np.array(found)


@pytest.mark.parametrize("k", [1, 3, 8, 19])
def test_mutual_neighbours_are_those_of_sorting(k):
    a = normal(20, 5)
    b = a[:, :3] + 0.5 * normal(20, 3, seed=1)
    np.testing.assert_allclose(alignment.mutual_knn(a, b, k).numpy(), brute(a, b, k))


def test_mutual_neighbours_in_closed_cases():
    a, b = normal(50, 6), normal(50, 4, seed=1)
    assert torch.equal(alignment.mutual_knn(a, a), torch.ones(50))
    assert torch.equal(alignment.mutual_knn(a, b, 49), torch.ones(50))  # all the others
    assert torch.equal(alignment.mutual_knn(a, b), alignment.mutual_knn(b, a))
    # two clusters of three in the one embedding, other partners in the other
    angles = torch.tensor([0.0, 0.1, 0.21, 2.0, 2.1, 2.21], dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    other = circle[[0, 1, 3, 2, 4, 5]]
    overlaps = alignment.mutual_knn(circle, other, 2)
    np.testing.assert_allclose(overlaps, [0.5, 0.5, 0, 0, 0.5, 0.5])


@pytest.mark.parametrize("k", [0, 10, 11])
def test_as_many_neighbours_as_points_are_refused(k):
    with pytest.raises(ValueError, match=r"1 <= k < 10"):
        alignment.mutual_knn(normal(10, 3), normal(10, 3), k)


def test_rotations_and_lengths_change_no_neighbours_and_stretching_does():
    a, b = normal(60, 5), normal(60, 5, seed=1) + normal(60, 5)
    expected = alignment.mutual_knn(a, b)
    rotation, _ = torch.linalg.qr(normal(5, 5, seed=2))
    lengths = normal(60, 1, seed=3).exp()
    assert torch.equal(alignment.mutual_knn(a @ rotation, 7 * b), expected)
    assert torch.equal(alignment.mutual_knn(lengths * a, b), expected)
    stretched = a * torch.tensor([9.0, 1, 1, 1, 1], dtype=torch.float64)
    assert not torch.equal(alignment.mutual_knn(stretched, b), expected)


def test_unrelated_embeddings_are_aligned_by_chance():
    """k / (n - 1), the mean of the hypergeometric distribution over k."""
    n, k = 40, 8
    means = [
        alignment.mutual_knn(normal(n, 6, seed=i), normal(n, 6, seed=1000 + i), k).mean().item()
        for i in range(200)
    ]
    error = np.std(means, ddof=1) / len(means) ** 0.5
    assert abs(np.mean(means) - k / (n - 1)) < 4 * error
    assert abs(np.mean(means) - k / n) < 8 * error + 1 / n
    assert error < 0.003


def test_the_loss_is_that_of_its_formula():
    z = normal(7, 7).numpy()
    rows = -np.log(np.exp(z).diagonal() / np.exp(z).sum(axis=1))
    columns = -np.log(np.exp(z).diagonal() / np.exp(z).sum(axis=0))
    expected = (rows.mean() + columns.mean()) / 2
    assert alignment.clip_loss(torch.tensor(z)).item() == pytest.approx(expected, rel=1e-12)
    assert alignment.clip_loss(torch.zeros(128, 128)).item() == pytest.approx(math.log(128))
    assert alignment.clip_loss(1e3 * torch.eye(5)).item() == pytest.approx(0.0)


def test_recall_counts_both_directions_and_no_ties():
    logits = torch.tensor([[3.0, 2.0, 1.0], [2.0, 5.0, 6.0], [0.0, 0.0, 7.0]])
    # images: ranks 1, 2, 1; texts: ranks 1, 1, 1
    assert alignment.recall(logits, 1) == pytest.approx(5 / 6)
    assert alignment.recall(logits.T, 1) == pytest.approx(5 / 6)
    assert alignment.recall(logits, 2) == 1.0
    assert alignment.recall(torch.zeros(6, 6), 5) == 0.0


@pytest.mark.parametrize("k", [1, 4, 8])
def test_without_each_is_alignment_of_the_others(k):
    a = normal(30, 4)
    b = a + 0.5 * normal(30, 4, seed=1)
    kept = [[j for j in range(30) if j != i] for i in range(30)]
    expected = [alignment.mutual_knn(a[rows], b[rows], k).mean().item() for rows in kept]
    np.testing.assert_allclose(alignment.without_each(a, b, k), expected, rtol=1e-6)


def test_the_interval_over_pairs_is_as_wide_as_fresh_pairs_scatter():
    """Two embeddings of different noise, over 200 samples of 100 pairs; the jackknife errs up."""
    found, plain = [], []
    for seed in range(200):
        latent = normal(100, 6, seed=10 * seed)
        text = latent + 0.5 * normal(100, 6, seed=10 * seed + 1)
        runs, overlaps = [], []
        for level, shift in ((0.4, 2), (0.8, 3)):
            image = latent + level * normal(100, 6, seed=10 * seed + shift)
            overlaps.append(alignment.mutual_knn(image, text))
            without = alignment.without_each(image, text)
            runs.append([alignment.Scores(float(overlaps[-1].mean()), without, 0.0, 0.0)])
        found.append(alignment.over_points(*runs))
        plain.append((overlaps[0] - overlaps[1]).std().item() / 10)
    means, halves = np.array(found).T
    assert means.mean() > 0.05
    spread = means.std(ddof=1)
    assert 1.0 < halves.mean() / (1.96 * spread) < 1.6
    assert np.mean(plain) < 0.8 * spread  # why the jackknife


def group_of(rows, i):
    return next(part for part, own in rows.items() if i in own)


def test_parts_are_disjoint_whole_and_share_no_near_images():
    pairs = synthetic(90)
    copies = pairs.images.clone()
    for i, j in ((3, 40), (40, 77), (10, 11)):
        copies[j] = copies[i] + 0.03  # a chain of three, and two
    pairs = emoji_pairs.Pairs(copies, pairs.features, pairs.names)
    groups = emoji_pairs.near(pairs.images)
    assert sorted(sorted(g) for g in groups if len(g) > 1) == [[3, 40, 77], [10, 11]]
    rows = emoji_pairs.split(pairs, 50)
    assert sorted(i for own in rows.values() for i in own) == list(range(90))
    assert [len(rows[part]) for part in emoji_pairs.PARTS] == [50, 20, 20]
    for i, j in ((3, 40), (3, 77), (10, 11)):
        assert group_of(rows, i) == group_of(rows, j)
    for one in emoji_pairs.PARTS:
        for other in emoji_pairs.PARTS:
            if one != other:
                a, b = (pairs.images[rows[p]].flatten(1).double() for p in (one, other))
                assert torch.cdist(a, b).min() / a.shape[1] ** 0.5 >= emoji_pairs.NEAR


def test_new_pairs_do_not_move_old_ones():
    pairs = synthetic(90)
    before = emoji_pairs.split(pairs[list(range(80))], 40)
    after = emoji_pairs.split(pairs, 90)
    order = [i for part in emoji_pairs.PARTS for i in before[part]]
    assert [i for i in after["train"] if i < 80] == order
    # mixed: code points that are next to each other are of a kind
    assert order == sorted(range(80), key=lambda i: hashlib.sha256(str(i).encode()).digest())


def test_constants_are_of_the_train_part():
    pairs = synthetic(60)
    rows = emoji_pairs.split(pairs, 30)
    data = emoji_pairs.standardized(pairs, rows)
    train = data["train"]
    torch.testing.assert_close(train.images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.images.std(dim=(0, 2, 3)), torch.ones(3))
    for part in data.values():
        torch.testing.assert_close(part.features.norm(dim=1), torch.ones(len(part)))
    other = emoji_pairs.Pairs(pairs.images.clone(), pairs.features.clone(), pairs.names)
    other.images[rows["test"]] += 1
    other.features[rows["test"]] *= 3
    again = emoji_pairs.standardized(other, rows)["train"]
    assert torch.equal(again.images, train.images)
    assert torch.equal(again.features, train.features)


def test_series_of_signs_are_left_out():
    kept = {c for c in range(0x110000) if emoji_pairs.wanted(c)}
    assert {ord("🐕"), ord("❤"), ord("⏰")} <= kept
    for text in ("7", "#", "🇦", "🏽", "🕐", "\u20e3", "\U000e0067"):
        assert ord(text) not in kept, unicodedata.name(text)
    assert 0xFE82C not in kept  # a private one without a name


def test_pictures_are_set_on_grey_and_centred(tmp_path):
    from PIL import Image

    bitmap = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    bitmap.paste((255, 0, 0, 255), (0, 0, 136, 128 // 2))
    file = tmp_path / "a.png"
    bitmap.save(file)
    found = emoji_pairs.picture(file.read_bytes())
    assert found.shape == (24, 24, 3)
    np.testing.assert_allclose(found[6], [[1, 0, 0]] * 24, atol=1e-6)
    np.testing.assert_allclose(found[-1], 128 / 255, atol=1e-6)


def test_a_missing_font_is_told(tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise FileNotFoundError("apt-get")

    monkeypatch.setattr(emoji_pairs, "FONT", Path("no/such/font.ttf"))
    monkeypatch.setattr(emoji_pairs.subprocess, "run", none)
    with pytest.raises(RuntimeError, match=r"apt-get download fonts-noto.*--font"):
        emoji_pairs.font_file(tmp_path)


def test_a_font_without_bitmaps_is_told():
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(RuntimeError, match=r"CBDT"):
        emoji_pairs.images(font)


@pytest.fixture(scope="module")
def data():
    pairs = synthetic(120)
    return emoji_pairs.standardized(pairs, emoji_pairs.split(pairs, 64))


def fit(data, *setting, epochs=5):
    chosen = alignment.Setting(*setting)
    return alignment.fit(chosen, data["train"], data["validation"], 0, epochs, size=32)


def test_training_learns_and_keeps_the_best_weights(data):
    run = fit(data, "SGD", 0.1, epochs=30)
    assert len(run.alignments) == 7
    assert run.alignments[0] < run.alignment
    assert run.alignments[-1] < run.alignment  # else nothing shows which weights are kept
    assert run.loss < 0.5 * math.log(32)
    model = alignment.fresh(data["train"], 0)
    assert alignment.aligned(model, data["validation"]) == run.alignments[0]
    model.load_state_dict(run.kept)
    assert alignment.aligned(model, data["validation"]) == run.alignment
    model.load_state_dict(run.last)
    assert alignment.train_loss(model, data["train"], 32) == pytest.approx(run.loss)


def test_methods_without_a_radius_are_sgd_and_with_one_not(data):
    plain = fit(data, "SGD", 0.05).last
    for method in ("SAM", "Monge SAM"):
        for rho, same in ((0.0, True), (0.2, False)):
            other = fit(data, method, 0.05, rho).last
            assert all(torch.equal(plain[k], other[k]) for k in plain) == same


def test_settings_make_their_optimizers():
    model = nn.Linear(2, 2)
    for method, kind in (("SAM", SAM), ("Monge SAM", MongeSAM), ("Adam", torch.optim.Adam)):
        optimizer = alignment.Setting(method, 0.3, 0.2).optimizer(model)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["lr"] == 0.3
        if method != "Adam":
            assert (optimizer.rho, optimizer.param_groups[0]["momentum"]) == (0.2, 0.9)


@pytest.mark.parametrize("method", ["SAM", "Monge SAM"])
def test_the_recorded_length_is_that_of_the_step(method):
    model = nn.Linear(3, 2)
    setting = alignment.Setting(method, 0.1, 0.7)
    optimizer = setting.optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum().backward()
    norm = alignment.length(model)
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    assert norm == pytest.approx(squares**0.5)
    optimizer.first_step()
    moved = sum(
        (p - b).double().square().sum().item()
        for p, b in zip(model.parameters(), before, strict=True)
    )
    assert setting.radius(norm) == pytest.approx(moved**0.5, rel=1e-5)


def test_a_training_that_blows_up_is_at_chance_and_has_its_start(data):
    run = fit(data, "SGD", 1e30)
    assert not math.isfinite(run.loss)
    assert run.at_chance(32)
    assert run.kept
    assert not fit(data, "SGD", 0.1, epochs=30).at_chance(32)


def test_shifts_move_by_whole_pixels_and_repeat_edges():
    image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(300, 3, 8, 8)
    moved = alignment.shifted(image, torch.Generator().manual_seed(0))
    seen = set()
    for one in moved:
        assert torch.equal(one[0], one[2])
        by = int(one[0, 4, 4]) - 36
        down, right = round(by / 8), by - 8 * round(by / 8)
        rows = (torch.arange(8) + down).clamp(0, 7)
        columns = (torch.arange(8) + right).clamp(0, 7)
        assert torch.equal(one[0], image[0, 0][rows][:, columns])
        seen.add((down, right))
    assert len(seen) == 25


def test_sharpness_is_that_of_the_mean_over_batches():
    """Value and largest eigenvalue against the dense Hessian of the mean of two batch losses."""
    pairs = synthetic(8)
    small = emoji_pairs.Pairs(pairs.images.double()[:, :, :2, :2], pairs.features.double()[:, :2],
                              pairs.names)  # fmt: skip
    torch.manual_seed(0)
    model = alignment.Towers(2, 2, width=1).double()
    fixed = alignment.batches(small, 4)
    assert len(fixed) == 2
    objective = sk.Objective.from_batch_loss(model.eval(), alignment.batch_loss, fixed)
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta):
        parts = theta.split([s.numel() for s in shapes])
        weights = {n: v.reshape(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        total = 0.0
        for b in fixed:
            z = torch.func.functional_call(model, weights, (b["images"], b["features"]))
            log = z.diagonal() - z.logsumexp(1), z.diagonal() - z.logsumexp(0)
            total = total - (log[0].mean() + log[1].mean()) / 4
        return total

    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    dense = torch.autograd.functional.hessian(loss, theta)
    assert objective.value() == pytest.approx(loss(theta).item(), rel=1e-12)
    found = sk.score(objective, ["top_eigenvalues:k=1", "hessian_trace"], num_groups=0)
    values = [s.estimate.value for s in found]
    assert values[0] == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-4)
    error = 4 * found[1].estimate.probe_error + 1e-9
    assert abs(values[1] - dense.trace().item()) <= error
    assert alignment.train_loss(model, small, 4) == pytest.approx(loss(theta).item())


def fake(alignments, setting, loss=1.0):
    return [
        alignment.Run(setting, i, [0.0, a], loss=loss, radius=0.1) for i, a in enumerate(alignments)
    ]


def test_choice_and_robustness_by_hand():
    s = alignment.Setting
    sam, monge = [[s(m, 0.1, r) for r in (0.1, 1.0)] for m in ("SAM", "Monge SAM")]
    runs = {
        sam[0]: fake([0.2, 0.4], sam[0]),
        sam[1]: fake([0.1, 0.1], sam[1], loss=math.log(128)),
        monge[0]: fake([0.25, 0.25], monge[0]),
        monge[1]: fake([0.35, 0.15], monge[1]),
    }
    assert two_modalities.chosen(runs, "SAM") == sam[0]
    assert two_modalities.chosen(runs, "Monge SAM") in monge
    assert two_modalities.starred(sam[0], runs) == ["0.1", "0.1\\*"]
    lines = {x.split("|")[1].strip(): x for x in two_modalities.robustness(runs, 128)[2:]}
    assert "| 0.2000 | 0.2500 |" in lines["whole grid"]
    assert "2 of 4 | 0 of 4 |" in lines["whole grid"]
    assert "| 0.1000 | 0.2500 | +0.1500 ±" in lines["\u03c1 = 1"]
    assert "2 of 2 | 0 of 2 |" in lines["\u03c1 = 1"]
    assert "| 0.3000 | 0.2500 | -0.0500 ±" in lines["\u03c1 = 0.1"]
    assert two_modalities.verdict(0.2, 0.1) == "higher"
    assert two_modalities.verdict(-0.2, 0.1) == "lower"
    assert two_modalities.verdict(-0.2, 0.3) == "not told apart"
    assert two_modalities.ratio([1.0, -1.0], [1.0, 1.0]) == "not all positive"


def test_equal_lengths_are_compared_on_the_line_between():
    s = alignment.Setting
    sam = {s("SAM", 0.1, r): fake([a, 2 * a], s("SAM", 0.1, r)) for r, a in ((0.01, 0.2), (1, 0.4))}
    monge = {s("Monge SAM", 0.1, r): fake([0.35, 0.7], s("Monge SAM", 0.1, r)) for r in (0.2, 3)}
    far = s("Monge SAM", 0.1, 9)
    for runs in monge.values():
        for run in runs:
            run.radius = 0.1  # half way in the logarithm, where SAM has 0.3 and 0.6
    monge[far] = fake([9.0, 9.0], far)
    for run in monge[far]:
        run.radius = 1.5
    mean, _ = two_modalities.at_equal_length(sam | monge)
    assert mean == pytest.approx((0.05 + 0.1) / 2)


def short(tmp_path, monkeypatch, *more):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["two_modalities", "--quick", "-o", str(page), *more])
    two_modalities.main()
    assert page.with_suffix(".png").stat().st_size > 20_000
    text = page.read_text()
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "(page.png)" in text
    for method in two_modalities.METHODS:
        assert len(re.findall(rf"(?m)^\| {method} \|", text)) >= 3
    return text


def test_the_comparison_in_short_on_synthetic_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_pairs, "load", lambda folder, font: synthetic(160))
    text = short(tmp_path, monkeypatch)
    assert "64 for train, 48 for validation, 48 for test" in text


@pytest.mark.slow
def test_the_comparison_in_short_on_emoji(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())  # packages are put there
    try:
        pairs = emoji_pairs.load(tmp_path)
    except RuntimeError as error:
        if not re.search("apt-get|pip", str(error)):
            raise  # only what cannot be had is no fault of ours
        pytest.skip(str(error))
    assert len(pairs) > 1300
    assert len(set(pairs.names)) == len(pairs)
    text = short(tmp_path, monkeypatch, "--folder", str(tmp_path))
    assert f"{len(pairs)} pairs of an emoji" in text
