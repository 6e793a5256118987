"""cgm.data: the shipped images and the tasks on them, folders, order and partners."""

import gzip
import hashlib
import os
import struct
from importlib import resources
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from cgm.data import (
    PINK,
    TASKS,
    TEAL,
    Dataset,
    edge_map,
    epoch_order,
    fashion,
    garment_mask,
    lab_to_rgb,
    load_folder,
    load_task,
    pack,
    to_float,
)
from cgm.data.folders import read_image

ALL_FOLDERS = ("pairs", "two_folders", "unpaired", "classes")


def all_rows(data):
    return data.batch(torch.arange(len(data)))


# The shipped file ---------------------------------------------------------------------------------


def test_the_shipped_images_are_the_published_ones():
    images, labels = fashion.read()
    idx = struct.pack(">4I", 0x803, 10000, 28, 28) + images.numpy().tobytes()
    assert hashlib.md5(idx).hexdigest() == "8181f5470baa50b63fa0f6fddb340f0a"
    idx = struct.pack(">2I", 0x801, 10000) + labels.byte().numpy().tobytes()
    assert hashlib.md5(idx).hexdigest() == "15d484375f8d13e6eb1aabb0c3f46965"


def test_the_license_lies_beside_the_images():
    text = resources.files("cgm.data").joinpath("FASHION_MNIST_LICENSE.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text
    assert "WITHOUT WARRANTY OF ANY KIND" in text


def test_pack_makes_a_file_that_unpacks_to_the_same(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), np.uint8)
    labels = rng.integers(0, 10, 30).astype(np.uint8)
    (tmp_path / "i.gz").write_bytes(
        gzip.compress(struct.pack(">4I", 0x803, 30, 28, 28) + images.tobytes())
    )
    (tmp_path / "l.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, 30) + labels.tobytes()))
    pack.main([str(tmp_path / name) for name in ("i.gz", "l.gz", "out")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.gz", "l.gz", "out"]
    unpacked = fashion.unpack((tmp_path / "out").read_bytes())
    np.testing.assert_array_equal(unpacked[0], images)
    np.testing.assert_array_equal(unpacked[1], labels)
    (tmp_path / "i.gz").write_bytes(gzip.compress(b"no IDX"))
    with pytest.raises(ValueError, match=r"i\.gz: not an IDX file"):
        pack.main([str(tmp_path / name) for name in ("i.gz", "l.gz", "out")])
    with pytest.raises(SystemExit, match=r"python -m cgm\.data\.pack"):
        pack.main([])


def test_the_split_keeps_the_last_100_of_each_class():
    labels = fashion.read()[1]
    train, test = fashion.rows_of("train"), fashion.rows_of("test")
    assert torch.cat([train, test]).sort().values.equal(torch.arange(10000))
    assert labels[train].bincount().tolist() == [900] * 10
    assert labels[test].bincount().tolist() == [100] * 10
    for label in range(10):
        assert train[labels[train] == label].max() < test[labels[test] == label].min()


# Tasks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, rows, event_shape, cond_shape, kind",
    [
        ("class_to_image", (9000, 1000), (1, 28, 28), (), "class"),
        ("complete", (9000, 1000), (1, 14, 28), (1, 14, 28), "image"),
        ("colorize", (1800, 200), (2, 28, 28), (1, 28, 28), "image"),
        ("edges_to_image", (9000, 1000), (1, 28, 28), (1, 28, 28), "image"),
        ("bouncing_ball", (10000, 2000), (3, 12, 12), (3, 12, 12), "image"),
        ("two_moons", (10000, 2000), (2, 1, 1), (), "class"),
        ("eight_gaussians", (10000, 2000), (2, 1, 1), (), "none"),
    ],
)
def test_tasks_have_the_documented_shapes(name, rows, event_shape, cond_shape, kind):
    train, test = load_task(name), load_task(name, "test")
    assert (len(train), len(test)) == rows
    assert (train.event_shape, train.cond_shape, train.cond_kind) == (event_shape, cond_shape, kind)
    assert train.name == name
    batch = train.batch(torch.tensor([5, 0, 5]))
    assert batch["y"].shape == (3, *event_shape)
    assert batch["cond"] is None if kind == "none" else batch["cond"].shape == (3, *cond_shape)
    assert batch["y"].dtype == torch.float32 and batch["y"].abs().max() <= 1
    assert batch["y"][0].equal(batch["y"][2]) and not batch["y"][0].equal(batch["y"][1])
    if kind == "image":
        assert batch["cond"].dtype == torch.float32 and batch["cond"].abs().max() <= 1
    assert load_task(name).batch(torch.tensor([5]))["y"].equal(batch["y"][:1])


def test_the_tasks_are_all_tested_and_unknown_ones_are_refused():
    on_images = ("class_to_image", "complete", "colorize", "edges_to_image")
    assert (*on_images, "bouncing_ball", "two_moons", "eight_gaussians") == TASKS
    with pytest.raises(ValueError, match=r"class_to_image, complete, colorize, .*got 'x'"):
        load_task("x")
    for task in ("complete", "two_moons"):
        with pytest.raises(ValueError, match=r"split.*'valid'"):
            load_task(task, "valid")


def test_class_to_image_pairs_labels_with_images():
    data = load_task("class_to_image", "test")
    images, labels = fashion.read()
    rows = fashion.rows_of("test")
    batch = all_rows(data)
    assert batch["cond"].equal(labels[rows])
    torch.testing.assert_close((batch["y"] + 1) * 127.5, images[rows].float())
    assert data.num_classes == len(data.class_names) == 10
    assert data.class_names[9] == "ankle boot"


def test_complete_puts_upper_and_lower_half_together():
    batch, whole = all_rows(load_task("complete", "test")), load_task("class_to_image", "test")
    assert torch.cat([batch["cond"], batch["y"]], 2).equal(all_rows(whole)["y"])


def test_colorize_gives_each_garment_both_colors():
    for split in ("train", "test"):
        batch = all_rows(load_task("colorize", split))
        y, mask = batch["y"], garment_mask(batch["cond"])
        shares = mask.float().mean((1, 2, 3))
        assert shares.min() > 0.2 and shares.max() < 0.95  # a garment, and something around it
        for half, color in zip(range(2), (TEAL, PINK), strict=True):
            painted = mask.chunk(2)[half] * torch.tensor(color)[:, None, None]
            assert y.chunk(2)[half].equal(painted)
        assert batch["cond"].chunk(2)[0].equal(batch["cond"].chunk(2)[1])


def test_garment_mask_cuts_between_two_gray_levels():
    levels = to_float(torch.tensor([0, 12, 13, 255], dtype=torch.uint8))
    assert garment_mask(levels).tolist() == [False, False, True, True]


def test_lab_to_rgb_knows_grays_primaries_teal_and_pink():
    light = torch.tensor([-1.0, 53.585 / 37.5 - 1]).view(2, 1, 1, 1)
    black, gray = (lab_to_rgb(light, torch.zeros(2, 2, 1, 1)) + 1).flatten(1) * 127.5
    assert black.abs().max() == 0
    assert (gray - 128).abs().max() < 0.2  # L* 53.585 is sRGB gray 128
    primaries = torch.tensor(  # CIELAB of sRGB's red, green and blue under D65
        [[53.2408, 80.0925, 67.2032], [87.7347, -86.1827, 83.1793], [32.297, 79.1875, -107.8602]]
    )[:, :, None, None]
    rgb = lab_to_rgb(primaries[:, :1] / 37.5 - 1, primaries[:, 1:] / 50)
    assert (rgb.flatten(1) - (2 * torch.eye(3) - 1)).abs().max() < 0.02
    for level in (0.0, 0.6):
        colors = torch.tensor([TEAL, PINK])[:, :, None, None]
        (r, g, b), (r2, g2, b2) = lab_to_rgb(torch.full((2, 1, 1, 1), level), colors).flatten(1)
        assert r + 0.5 < min(g, b)  # teal: hardly any red
        assert r2 > b2 + 0.1 and b2 > g2 + 0.1  # pink: red, then blue


def test_edges_lie_where_gray_levels_step():
    step = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    step[..., 3:] = 61  # a step of s gives 4 s: just above the threshold of 240
    expected = torch.zeros_like(step)
    expected[..., 2:4] = 255
    assert edge_map(step).equal(expected)
    assert edge_map(step.transpose(2, 3)).equal(expected.transpose(2, 3))
    step[..., 3:] = 60
    assert edge_map(step).max() == 0


def test_edge_maps_of_the_images_are_neither_empty_nor_full():
    cond = all_rows(load_task("edges_to_image", "test"))["cond"]
    assert cond.unique().tolist() == [-1, 1]
    shares = (cond > 0).float().mean((1, 2, 3))
    assert shares.min() > 0.005 and shares.max() < 0.8 and 0.2 < shares.mean() < 0.35


# Order and data sets ------------------------------------------------------------------------------


def test_epoch_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(1000, 3, 7)
    assert order.dtype == torch.int64 and order.sort().values.equal(torch.arange(1000))
    torch.manual_seed(1)
    torch.rand(5)
    assert epoch_order(1000, 3, 7).equal(order)
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        assert not epoch_order(1000, seed, epoch).equal(order)
    assert order[:5].tolist() == [963, 473, 987, 378, 529]
    assert epoch_order(0, 0, 0).tolist() == [] and epoch_order(1, 0, 0).tolist() == [0]
    with pytest.raises(ValueError, match="negative"):
        epoch_order(-1, 0, 0)


def test_epoch_order_puts_every_row_everywhere():
    places = torch.stack([epoch_order(10, 0, epoch).argsort() for epoch in range(500)])
    counts = torch.stack([places[:, row].bincount(minlength=10) for row in range(10)])
    assert (counts - 50).abs().max() < 4.5 * (500 * 0.1 * 0.9) ** 0.5


def test_a_data_set_of_tensors():
    y, tokens = torch.randn(4, 3), torch.tensor([[0, 1]] * 4)
    data = Dataset("mine", y, tokens, "tokens", 2)
    assert data.event_shape == (3,) and data.cond_shape == (2,)
    batch = data.batch(torch.tensor([3, 1]))
    assert batch["y"].equal(y[[3, 1]]) and batch["cond"].equal(tokens[:2])
    unconditional = Dataset("mine", y)
    assert unconditional.cond_kind == "none" and unconditional.cond_shape == ()
    assert unconditional.batch(torch.tensor([0]))["cond"] is None
    assert unconditional.batch(torch.tensor([], dtype=torch.int64))["y"].shape == (0, 3)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"y": torch.zeros(0, 2)}, ValueError, "y must be"),
        ({"y": torch.zeros(2, 2, dtype=torch.float64)}, TypeError, r"y must be.*float64"),
        ({"y": torch.tensor([[0.0], [torch.nan]])}, ValueError, "y must be finite, got row 1"),
        ({"y": torch.tensor([[torch.inf], [0.0]])}, ValueError, "y must be finite, got row 0"),
        ({"cond_kind": "class"}, ValueError, "cond must be given"),
        ({"cond": torch.zeros(2), "cond_kind": "words"}, ValueError, "cond_kind.*'words'"),
        ({"cond": torch.zeros(2, 1), "cond_kind": "image"}, ValueError, "cond.*4 dimensions"),
        ({"cond": torch.zeros(3, 1, 1, 1), "cond_kind": "image"}, ValueError, "as many rows"),
        (
            {"cond": torch.full((2, 1, 1, 1), torch.nan), "cond_kind": "image"},
            ValueError,
            "cond must be finite",
        ),
        ({"cond": torch.zeros(2), "cond_kind": "class"}, TypeError, r"cond must be.*int64"),
        ({"cond": torch.tensor([0, 1]), "cond_kind": "class"}, ValueError, "num_classes = 1"),
    ],
)
def test_a_wrong_data_set_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        Dataset(**{"name": "x", "y": torch.zeros(2, 2), "num_classes": 1} | arguments)


def test_wrong_rows_are_refused():
    data = Dataset("x", torch.zeros(2, 2))
    for rows in (torch.tensor([2]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"rows must be in \[0, 2\)"):
            data.batch(rows)
    for rows in (torch.tensor([True, False]), torch.tensor(0)):
        with pytest.raises(TypeError, match="rows must be int64"):
            data.batch(rows)


# Augmentation -------------------------------------------------------------------------------------


def numbered_images(n, height=8, width=8, first=0):
    """Images of which each pixel has a number of its own, and its image's in channel 1."""
    places = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    return torch.stack([torch.cat([places, torch.full_like(places, first + i)]) for i in range(n)])


def places_of(images, width=8):
    """(top, left, mirrored) of crops of `numbered_images`, each of which must be a square."""
    found = []
    for image in images[:, 0].long():
        mirrored = bool(image[0, 0] > image[0, -1])
        upright = image.flip(1) if mirrored else image
        top, left = divmod(int(upright[0, 0]), width)
        side = torch.arange(len(image))
        assert upright.equal((top + side)[:, None] * width + left + side)
        found.append((top, left, mirrored))
    return found


def test_crops_and_flips_of_a_pair_are_one():
    images = numbered_images(200)
    data = Dataset("x", images, images + 0, "image", crop=6, flip=True)
    assert data.event_shape == data.cond_shape == (2, 6, 6)
    rows = torch.arange(200)
    batch = data.batch(rows, epoch=3)
    assert batch["y"].equal(batch["cond"]) and batch["y"].is_contiguous()
    assert batch["y"][:, 1, 0, 0].equal(rows.float())
    places = places_of(batch["y"])
    for side in (0, 1):  # each of the three places, as often as another
        counts = np.bincount([place[side] for place in places], minlength=3)
        assert len(counts) == 3 and abs(counts - 200 / 3).max() < 4 * (200 * 2 / 9) ** 0.5
    assert abs(sum(mirrored for *_, mirrored in places) - 100) < 4 * 50**0.5
    assert len(set(places)) == 18
    # A function of (row, epoch), whatever the batch.
    alone = data.batch(torch.tensor([7, 0, 7]), epoch=3)["y"]
    assert alone.equal(batch["y"][[7, 0, 7]])
    assert places_of(data.batch(rows, epoch=4)["y"]) != places
    none = torch.tensor([], dtype=torch.int64)
    assert data.batch(none)["y"].shape == (0, 2, 6, 6)


def test_known_places_of_crops():
    """Resuming a run of another version finds the same crops."""
    data = Dataset("x", numbered_images(3), crop=5, flip=True)
    places = [places_of(data.batch(torch.arange(3), epoch)["y"]) for epoch in (0, 1)]
    assert places == [
        [(3, 2, True), (2, 1, False), (2, 3, True)],
        [(2, 1, False), (1, 1, True), (1, 2, True)],
    ]


def test_crops_of_unpaired_images_are_each_their_own():
    y, cond = numbered_images(50), numbered_images(40, first=100)
    data = Dataset("x", y, cond, "image", paired=False, crop=4, flip=True)
    plain = Dataset("x", y, cond, "image", paired=False)
    rows = torch.arange(50)
    batch = data.batch(rows, epoch=2)
    partners = plain.batch(rows, epoch=2)["cond"]
    assert batch["cond"][:, 1, 0, 0].equal(partners[:, 1, 0, 0])  # augmentation changes no partner
    pairs = list(zip(places_of(batch["y"]), places_of(batch["cond"]), strict=True))
    assert sum(a[:2] == b[:2] for a, b in pairs) < 12  # one of 25 places by chance
    assert 10 < sum(a[2] == b[2] for a, b in pairs) < 40


def test_flip_alone_crop_alone_and_neither():
    images = numbered_images(30, 4, 6)
    rows = torch.arange(30)
    flipped = Dataset("x", images, flip=True)
    assert flipped.event_shape == (2, 4, 6)
    y = flipped.batch(rows)["y"]
    kept = (y == images).flatten(1).all(1)
    assert 5 < kept.sum() < 25
    assert y[~kept].equal(images[~kept].flip(3))
    cropped = Dataset("x", images, crop=4).batch(rows)["y"]
    assert {place[::2] for place in places_of(cropped, 6)} == {(0, False)}
    assert Dataset("x", images, crop=4).batch(rows)["cond"] is None
    assert Dataset("x", images).batch(rows)["y"].equal(images)


def test_classes_keep_their_labels_when_cropped():
    data = Dataset("x", numbered_images(9), torch.arange(9), "class", 9, crop=3)
    batch = data.batch(torch.tensor([4, 2]))
    assert batch["cond"].tolist() == batch["y"][:, 1, 0, 0].tolist() == [4, 2]
    assert data.cond_shape == ()


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"crop": 9}, "crop must be at most the side of the images, 8, got 9"),
        ({"crop": -1}, "crop must be a side in pixels, or 0 for none, got -1"),
        ({"crop": 2.0}, r"crop must be .*, got 2\.0"),
        ({"crop": True}, "crop must be .*, got True"),
        ({"y": torch.zeros(2, 8), "flip": True}, "for images"),
        (
            {"cond": torch.zeros(2, 2, 8, 9), "cond_kind": "image", "flip": True},
            "pairs of one size",
        ),
        (
            {"cond": torch.zeros(2, 2, 9, 4), "cond_kind": "image", "paired": False, "crop": 5},
            "at most .*, 4, got 5",
        ),
    ],
)
def test_wrong_augmentation_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        Dataset(**{"name": "x", "y": numbered_images(2)} | arguments)


@pytest.mark.parametrize("layout", ALL_FOLDERS)
def test_folders_are_cropped_and_flipped(tmp_path, layout):
    good(tmp_path, layout)
    data = load_folder(tmp_path, layout, size=8, crop=6, flip=True)
    assert (data.crop, data.flip, data.event_shape) == (6, True, (3, 6, 6))
    assert data.y.shape[2:] == (8, 8)
    assert data.cond_shape == (() if layout == "classes" else (3, 6, 6))


# Folders ------------------------------------------------------------------------------------------


def flat(color, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, color)


def save(image, *parts, **options):
    """Write an image, making its folders."""
    path = parts[0].joinpath(*parts[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def good(root, layout):
    """The smallest right folder of a layout; returns one of its files."""
    if layout == "pairs":
        return save(flat("red", (16, 8)), root, "1.png")
    sides = [save(flat(color), root, side, "1.png") for side, color in (("A", 0), ("B", 255))]
    return sides[0]


def level(images):
    """Gray levels 0 .. 255 of float images of one color, (B, C)."""
    assert images.amax((2, 3)).sub(images.amin((2, 3))).max() < 0.05
    return ((images.mean((2, 3)) + 1) * 127.5).round().long().tolist()


def test_pairs_side_by_side(tmp_path):
    for i, (left, right) in enumerate([((255, 0, 0), (0, 255, 0)), ((0, 0, 255), (9, 9, 9))]):
        image = flat(left, (24, 6))
        image.paste(right, (12, 0, 24, 6))
        save(image, tmp_path, f"{i}.png")
    save(flat("red"), tmp_path, ".hidden.png")
    (tmp_path / "notes.txt").write_text("passed over")
    data = load_folder(tmp_path, "pairs", size=8)
    assert len(data) == 2 and data.event_shape == data.cond_shape == (3, 8, 8)
    assert data.name == tmp_path.name and data.y.dtype == torch.uint8
    batch = all_rows(data)
    assert level(batch["cond"]) == [[255, 0, 0], [0, 0, 255]]
    assert level(batch["y"]) == [[0, 255, 0], [9, 9, 9]]
    swapped = all_rows(load_folder(tmp_path, "pairs", size=8, direction="BtoA"))
    assert swapped["y"].equal(batch["cond"]) and swapped["cond"].equal(batch["y"])


@pytest.mark.parametrize("sides", [("x/A", "x/B"), ("xA", "xB")])
def test_two_folders_pair_equal_names(tmp_path, sides):
    for stem, value in (("b", 20), ("a", 10)):
        save(flat(value, mode="L"), tmp_path, sides[0], f"{stem}.png")
        save(flat(value + 5, mode="L"), tmp_path, sides[1], f"{stem}.bmp")
    data = load_folder(tmp_path / "x", "two_folders", size=4, channels=1)
    batch = all_rows(data)
    assert data.event_shape == (1, 4, 4) and data.cond_kind == "image"
    assert level(batch["cond"]) == [[10], [20]] and level(batch["y"]) == [[15], [25]]
    back = load_folder(tmp_path / "x", "two_folders", size=4, channels=1, direction="BtoA")
    assert level(all_rows(back)["y"]) == [[10], [20]]


def test_unpaired_partners_are_drawn_anew_each_epoch(tmp_path):
    for i in range(7):
        save(flat(i, mode="L"), tmp_path, "trainA", f"a{i}.png")
    for i in range(3):
        save(flat(100 + i, mode="L"), tmp_path, "trainB", f"b{i}.png")
    data = load_folder(tmp_path / "train", "unpaired", size=2, channels=1)
    assert len(data) == 3 and not data.paired
    rows = torch.tensor([2, 0, 1])
    first = data.batch(rows)
    assert level(first["y"]) == [[102], [100], [101]]
    assert data.batch(rows)["cond"].equal(first["cond"])
    assert data.batch(rows[:1])["cond"].equal(first["cond"][:1])  # whatever the batch
    assert not data.batch(rows, epoch=1)["cond"].equal(first["cond"])
    drawn = [value for e in range(200) for [value] in level(data.batch(rows, epoch=e)["cond"])]
    counts = np.bincount(drawn, minlength=7)
    assert len(counts) == 7 and abs(counts - 600 / 7).max() < 4 * (600 / 7) ** 0.5
    back = load_folder(tmp_path / "train", "unpaired", size=2, channels=1, direction="BtoA")
    assert len(back) == 7 and level(all_rows(back)["y"]) == [[i] for i in range(7)]


def test_one_folder_per_class(tmp_path):
    save(flat("white"), tmp_path, "zebra", "1.webp", lossless=True)
    for name in ("2.JPG", "1.jpeg"):
        save(flat("black"), tmp_path, "ant", name)
    (tmp_path / ".cache").mkdir()
    data = load_folder(tmp_path, "classes", size=4)
    assert data.class_names == ("ant", "zebra") and data.num_classes == 2
    assert data.cond_kind == "class" and data.cond_shape == ()
    batch = all_rows(data)
    assert batch["cond"].tolist() == [0, 0, 1]
    assert level(batch["y"]) == [[0] * 3, [0] * 3, [255] * 3]


def test_images_are_resized_with_antialiasing(tmp_path):
    lines = np.tile(np.array([0, 255], np.uint8), (64, 32))  # single columns, black and white
    save(Image.fromarray(lines), tmp_path, "a", "1.png")
    [image] = all_rows(load_folder(tmp_path, "classes", size=8, channels=1))["y"]
    assert image.shape == (1, 8, 8) and image[:, :, 1:-1].abs().max() < 0.1  # even gray


def encodings():
    """Name, image, expected RGB, options of Image.save."""
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    see_through = palette.copy()
    see_through.info["transparency"] = 1
    sixteen = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    return {
        "rgba.png": (half, [255, 127, 127], {}),
        "rgba.webp": (half, [255, 127, 127], {"lossless": True}),
        "la.png": (Image.new("LA", (8, 8), (50, 0)), [255] * 3, {}),
        "palette.png": (palette, [10, 20, 30], {}),
        "palette.bmp": (palette, [10, 20, 30], {}),
        "transparent_palette.png": (see_through, [255] * 3, {"transparency": 1}),
        "keyed_rgb.png": (flat((1, 2, 3)), [255] * 3, {"transparency": (1, 2, 3)}),
        "sixteen_bit.png": (sixteen, [156] * 3, {}),  # 40000 / 257 = 155.6
        "one_bit.png": (Image.new("1", (8, 8), 1), [255] * 3, {}),
        "gray.jpg": (flat(77, mode="L"), [77] * 3, {"quality": 100}),
        "cmyk.jpg": (flat((0, 255, 255, 0), mode="CMYK"), [255, 0, 0], {"quality": 100}),
    }


@pytest.mark.parametrize("name", encodings())
def test_every_encoding_becomes_eight_bit_rgb(tmp_path, name):
    image, expected, options = encodings()[name]
    save(image, tmp_path, "c", name, **options)
    [got] = level(all_rows(load_folder(tmp_path, "classes", size=8))["y"])
    assert np.abs(np.array(got) - expected).max() <= 2, got
    [[gray]] = level(all_rows(load_folder(tmp_path, "classes", size=8, channels=1))["y"])
    assert abs(gray - np.dot(expected, [0.299, 0.587, 0.114])) <= 2


@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
def test_exif_orientation_is_honored(tmp_path, name):
    image = flat("black", (16, 32))
    image.paste("white", (0, 0, 16, 16))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: black left, white right
    save(image, tmp_path, name, exif=exif)
    batch = all_rows(load_folder(tmp_path, "pairs", size=8))
    assert level(batch["cond"]) == [[0] * 3] and level(batch["y"]) == [[255] * 3]


@pytest.mark.parametrize("layout", ALL_FOLDERS)
@pytest.mark.parametrize("harm", ["empty", "truncated", "text", "broken"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, layout, harm):
    good(tmp_path, layout)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    bad = good(tmp_path, layout).with_name("1.png")
    Image.fromarray(noise).save(bad)
    data = bytearray(bad.read_bytes())
    if harm == "broken":
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    cut = {"empty": b"", "truncated": data[:-2000], "text": b"hello", "broken": data}
    bad.write_bytes(cut[harm])
    with pytest.raises(ValueError, match=r"1\.png: cannot be read as an image") as caught:
        load_folder(tmp_path, layout)
    assert str(caught.value).startswith(str(bad))


@pytest.mark.parametrize("name", ["1.jpg", "1.webp", "1.bmp"])
def test_truncated_files_of_other_formats_are_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(Image.fromarray(noise), tmp_path, "c", name)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        load_folder(tmp_path, "classes")


@pytest.mark.parametrize("name", ["1.tif", "1.TIFF", "1.gif", "1.heic"])
def test_images_of_other_formats_are_not_passed_over(tmp_path, name):
    save(flat("red"), tmp_path, "c", "0.png")
    (tmp_path / "c" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"c/{name}: must be of \.bmp .*, others are not read"):
        load_folder(tmp_path, "classes")


def test_a_file_of_another_format_says_which_fit(tmp_path):
    flat("red").save(tmp_path / "c.tif")
    with pytest.raises(ValueError, match=r"c\.tif: cannot be .*: must be a BMP, JPEG, PNG or WebP"):
        read_image(tmp_path / "c.tif", 3)


@pytest.mark.parametrize("name", ["1.png", "1.webp"])
def test_animations_are_refused(tmp_path, name):
    others = [flat("blue"), flat("green")]
    save(flat("red"), tmp_path, "c", name, save_all=True, append_images=others)
    with pytest.raises(ValueError, match=f"{name}: .*must be one image, is an animation of 3"):
        load_folder(tmp_path, "classes")


def sixteen_bit_rgb(value):
    """A PNG of one pixel of this color, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    header = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
    pixels = compress(b"\0" + struct.pack(">3H", value, value, value))
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_twelve_bits_in_sixteen_are_refused(tmp_path):
    """They would come out black: 4095 of 65535 is level 15 of 255."""
    file = tmp_path / "c" / "1.png"
    for highest in (4095, 1):
        save(Image.fromarray(np.array([[0, highest]], np.uint16)), tmp_path, "c", "1.png")
        with pytest.raises(ValueError, match=r"1\.png: .*must use its 16 bits: .* by 16"):
            load_folder(tmp_path, "classes")
        file.write_bytes(sixteen_bit_rgb(highest if highest > 1 else 256))
        with pytest.raises(ValueError, match=r"1\.png: .*must use its 16 bits"):
            load_folder(tmp_path, "classes")
    for value, expected in ((0, 0), (4096, 16), (65535, 255)):
        save(Image.fromarray(np.full((2, 2), value, np.uint16)), tmp_path, "c", "1.png")
        [got] = level(all_rows(load_folder(tmp_path, "classes", size=2))["y"])
        assert got == [expected] * 3
        file.write_bytes(sixteen_bit_rgb(value))
        [got] = level(all_rows(load_folder(tmp_path, "classes", size=2))["y"])
        assert got == [expected] * 3


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path):
    image = Image.fromarray(np.array([[300, 40000], [300, 40000]], np.uint16))
    image.info["transparency"] = 300
    save(image, tmp_path, "c", "1.png", transparency=300)
    got = load_folder(tmp_path, "classes", size=2, channels=1).y
    assert got.flatten().tolist() == [255, 156, 255, 156]


def test_what_unpacks_to_too_much_is_refused_before(tmp_path, monkeypatch):
    """Of 13,000 x 13,000 pixels in a small file nothing is decoded."""
    Image.new("1", (13_000, 13_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    with pytest.raises(ValueError, match=r"bomb\.png: .*at most 67108864 pixels, has 13000"):
        read_image(tmp_path / "bomb.png", 3)


def test_broken_links_and_pipes_are_named(tmp_path):
    save(flat("red"), tmp_path, "c", "0.png")
    (tmp_path / "c" / "1.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"1\.png: must be a file, is a broken link"):
        load_folder(tmp_path, "classes")
    (tmp_path / "c" / "1.png").unlink()
    (tmp_path / "c" / "1.png").symlink_to(tmp_path / "c" / "0.png")
    assert len(load_folder(tmp_path, "classes")) == 2
    os.mkfifo(tmp_path / "c" / "2.png")
    for read in (load_folder, lambda path, _: read_image(path / "c" / "2.png", 3)):
        with pytest.raises(ValueError, match=r"2\.png: must be a file"):
            read(tmp_path, "classes")


def test_classes_are_in_natural_order(tmp_path):
    names = ["1", "2", "10", "a2b", "a10a", "a10b", "b"]
    for name in reversed(names):
        save(flat(len(name)), tmp_path, name, "1.png")
    assert load_folder(tmp_path, "classes", size=2).class_names == tuple(names)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"y": np.zeros((2, 3, 8, 8), np.uint8)}, TypeError, "y must be a tensor.*from_numpy"),
        ({"cond": [0, 1], "cond_kind": "class"}, TypeError, "cond must be a tensor.*got list"),
        ({"y": torch.zeros(2, 8, 6, 3, dtype=torch.uint8)}, ValueError, r"y\.movedim\(3, 1\)"),
        ({"y": torch.zeros(2, 28, 28, 1)}, ValueError, r"looks like \(N, H, W, C\)"),
        (
            {"cond": torch.zeros(2, 8, 8, 4), "cond_kind": "image"},
            ValueError,
            r"cond must be \(N, C, H, W\)",
        ),
        (
            {"y": torch.arange(256.0).view(1, 1, 16, 16)},
            ValueError,
            r"y must be in \[-1, 1\].*uint8",
        ),
        (
            {"cond": torch.full((2, 3, 4, 4), 255.0), "cond_kind": "image"},
            ValueError,
            r"cond must be in \[-1, 1\] if float32, got values from 255 to 255",
        ),
        (
            {"cond": torch.tensor([0, 1]), "cond_kind": "class", "class_names": ("a",)},
            ValueError,
            "class_names must be 2 names, got 1",
        ),
    ],
)
def test_what_looks_like_something_else_is_refused(arguments, error, match):
    given = {"name": "x", "y": torch.zeros(2, 3, 8, 8), "num_classes": 2} | arguments
    with pytest.raises(error, match=match):
        Dataset(**given)
    for y in (torch.zeros(2, 64, 1, 1), torch.randn(2, 16, 4, 4), torch.rand(2, 3, 8, 8)):
        assert len(Dataset("x", y)) == 2


@pytest.mark.parametrize("layout", ALL_FOLDERS)
def test_missing_and_empty_folders_are_named(tmp_path, layout):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"nowhere.*: no such folder"):
        load_folder(nowhere, layout)
    (tmp_path / "a_file").write_text("")
    if layout in ("pairs", "classes"):
        with pytest.raises(ValueError, match="a_file: not a folder"):
            load_folder(tmp_path / "a_file", layout)
    for name in ("A", "B"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    place = "empty: no images" if layout == "pairs" else "A: no images"
    with pytest.raises(ValueError, match=place):
        load_folder(tmp_path / "empty", layout)


def test_an_empty_class_and_no_class_are_refused(tmp_path):
    save(flat("red"), tmp_path, "full", "1.png")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow: no images"):
        load_folder(tmp_path, "classes")
    with pytest.raises(ValueError, match="full: no class folders"):
        load_folder(tmp_path / "full", "classes")


def test_pairs_of_odd_width_are_refused(tmp_path):
    save(flat("red", (15, 8)), tmp_path, "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png: .*even width, got 15"):
        load_folder(tmp_path, "pairs")


@pytest.mark.parametrize("alone", ["A", "B"])
def test_two_folders_name_the_file_without_partner(tmp_path, alone):
    good(tmp_path, "two_folders")
    path = save(flat("red"), tmp_path, alone, "single.png")
    with pytest.raises(ValueError, match="no image of that name in") as caught:
        load_folder(tmp_path, "two_folders")
    assert str(path) in str(caught.value)


def test_two_folders_of_other_sizes_or_double_names_are_refused(tmp_path):
    good(tmp_path, "two_folders")
    save(flat("red", (8, 9)), tmp_path, "B", "1.png")
    with pytest.raises(ValueError, match=r"1\.png is 8 x 8 .*1\.png is 8 x 9"):
        load_folder(tmp_path, "two_folders")
    save(flat("red"), tmp_path, "B", "1.bmp")
    with pytest.raises(ValueError, match=r"1\.png: 1\.bmp beside it has the same name"):
        load_folder(tmp_path, "two_folders")


def test_one_side_alone_is_refused(tmp_path):
    save(flat("red"), tmp_path, "A", "1.png")
    with pytest.raises(ValueError, match="B: no such folder"):
        load_folder(tmp_path, "unpaired")
    save(flat("red"), tmp_path, "sub", "trainA", "1.png")
    with pytest.raises(ValueError, match=r"sub: for its trainA and trainB pass .*train as path"):
        load_folder(tmp_path / "sub", "unpaired")


@pytest.mark.parametrize(
    "option, match",
    [
        ({"layout": "grid"}, "layout must be one of pairs, two_folders, .*'grid'"),
        ({"direction": "ab"}, "direction must be one of AtoB, BtoA, got 'ab'"),
        ({"channels": 4}, "channels must be one of 1, 3, got 4"),
        ({"size": 0}, "size must be .*, got 0"),
        ({"size": True}, "size must be .*, got True"),
        ({"size": 1.5}, "size must be .*, got 1.5"),
        ({"size": 8, "crop": 9}, "crop must be from 0, none, to size 8, got 9"),
        ({"crop": -1}, "crop must be from 0, none, to size 64, got -1"),
        ({"crop": 2.5}, r"crop must be .*, got 2\.5"),
    ],
)
def test_wrong_options_are_refused(tmp_path, option, match):
    good(tmp_path, "pairs")
    with pytest.raises(ValueError, match=match):
        load_folder(tmp_path, **option)
