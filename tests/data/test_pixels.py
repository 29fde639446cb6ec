"""Pixels as a viewer shows them: grey stays grey, EXIF turns, what is transparent needs a colour, sizes agree."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.archives import encoded, write_folder, write_tar, write_zip

from mmf_fast.data import load
from mmf_fast.data.formats import DataError, open_source
from mmf_fast.data.prepare import main, prepare

ORIENTATION = 0x0112


def noise(height, width, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def grey(i):
    return noise(8, 8, "L", i)


def loaded(path, **options):
    source = open_source(path, **options)
    return np.stack([item.load() for item in source.items()]), source


# ---- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "gif", "bmp"])
def test_greyscale_images_keep_one_channel(kind, tmp_path):
    """https://github.com/lucidrains/denoising-diffusion-pytorch/issues/55: a network of one channel, data of three."""
    files = {f"{i}.{kind}": encoded(grey(i), kind) for i in range(3)}
    found, source = loaded(write_tar(tmp_path / "a.tar", files, ""))
    assert found.shape == (3, 1, 8, 8) and source.looks == {"greyscale": 3}
    if kind != "jpeg":
        assert np.array_equal(found[1, 0], np.asarray(grey(1)))


def test_a_grey_set_trains_with_one_channel(tmp_path):
    write_folder(tmp_path / "set", {f"{label}/{i}.png": encoded(grey(i)) for label in "ab" for i in range(2)})
    prepare(tmp_path / "set", tmp_path / "out")
    assert load("images", path=str(tmp_path / "out")).shape == (1, 8, 8)


def test_colour_of_equal_channels_stays_colour(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(grey(0).convert("RGB"))})
    assert loaded(tmp_path)[0].shape == (1, 3, 8, 8)


def test_a_palette_of_greys_is_grey(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(Image.new("L", (8, 8), 77).convert("P"))})
    assert (loaded(tmp_path)[0] == np.full((1, 1, 8, 8), 77)).all()


def test_a_mixed_set_is_refused_until_channels_are_said(tmp_path):
    """ImageNet is one. https://github.com/lucidrains/imagen-pytorch/issues/195: [3, 480, 480] and [1, 480, 480]."""
    write_folder(tmp_path / "set", {"1.png": encoded(grey(1)), **{f"{i}.png": encoded(noise(8, 8)) for i in (2, 3)}})
    with pytest.raises(DataError, match=r"1\.png: is greyscale, as 1 of 3 images are; pass --channels 3 \(or 1\)"):
        prepare(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    three, one = loaded(tmp_path / "set", channels=3)[0], loaded(tmp_path / "set", channels=1)[0]
    assert three.shape == (3, 3, 8, 8) and one.shape == (3, 1, 8, 8)
    assert (three[0] == np.asarray(grey(1))).all() and (one[0] == np.asarray(grey(1))).all()
    assert np.array_equal(one[1, 0], np.asarray(noise(8, 8).convert("L")))


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind, tmp_path):
    """https://github.com/huggingface/diffusers/pull/3465, https://github.com/kohya-ss/sd-scripts/issues/1316."""
    upright = noise(16, 24).resize((96, 64), Image.Resampling.NEAREST)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose that EXIF's turn undoes
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    write_folder(tmp_path, {f"1.{kind}": encoded(stored, kind, exif=exif, **options)})
    shown = ImageOps.exif_transpose(Image.open(tmp_path / f"1.{kind}")).size
    assert shown == (96, 64)  # PIL agrees on what was stored
    found, source = loaded(tmp_path)
    assert found.shape == (1, 3, 64, 96)
    difference = np.abs(found[0].transpose(1, 2, 0).astype(int) - np.asarray(upright))
    assert difference.max() == 0 if kind != "jpeg" else difference.mean() < 3
    assert source.looks.get("turned upright", 0) == (orientation > 1)


def test_sizes_are_compared_upright(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    images = {"1.jpg": encoded(noise(8, 16), "jpeg"), "2.jpg": encoded(noise(16, 8), "jpeg", exif=exif)}
    assert loaded(write_folder(tmp_path, images))[0].shape == (2, 3, 8, 16)


# ---- transparency ----------------------------------------------------------------------------------------------------


def half_clear(mode="RGBA"):
    """Left half opaque red, right half transparent with green hidden below."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (4, 0, 8, 8))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("kind", ["rgba", "palette", "colour key"])
def test_what_is_hidden_below_transparent_pixels_is_not_shown(kind, tmp_path):
    """https://github.com/kohya-ss/sd-scripts/issues/1269, https://github.com/mflux-community/mflux/pull/722."""
    if kind == "rgba":
        content = encoded(half_clear())
    elif kind == "palette":
        content = encoded(half_clear("RGB").quantize(2), transparency=half_clear("RGB").quantize(2).getpixel((7, 0)))
    else:
        content = encoded(half_clear("RGB"), transparency=(0, 255, 0))
    path = write_zip(tmp_path / "a.zip", {"1.png": content, "2.png": encoded(noise(8, 8))})
    with pytest.raises(
        DataError, match=r"1\.png: has transparent pixels, as 1 of 2 images have; pass --background white"
    ):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for background, colour in {"white": (255, 255, 255), "#0000ff": (0, 0, 255), "none": (0, 255, 0)}.items():
        found, source = loaded(path, background=background)
        assert (found[0, :, :, :4] == np.array([255, 0, 0])[:, None, None]).all()
        assert (found[0, :, :, 4:] == np.array(colour)[:, None, None]).all()
        assert np.array_equal(found[1].transpose(1, 2, 0), np.asarray(noise(8, 8)))
        assert source.looks["with transparent pixels"] == 1


def test_half_transparent_pixels_are_mixed(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 128)))})
    found = loaded(tmp_path, background="white")[0].astype(int)
    expected = np.array([200, 0, 0]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(found[0, :, 0, 0] - expected).max() <= 1


def test_an_alpha_channel_that_is_opaque_is_no_matter(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(noise(8, 8).convert("RGBA")), "2.png": encoded(noise(8, 8))})
    assert "with transparent pixels" not in loaded(tmp_path)[1].looks


def test_grey_with_transparency_stays_grey(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(Image.merge("LA", [grey(0), Image.new("L", (8, 8), 0)]))})
    assert (loaded(tmp_path, background="white")[0] == np.full((1, 1, 8, 8), 255)).all()


def test_a_background_that_is_no_colour(tmp_path):
    write_folder(tmp_path, {"1.png": encoded(half_clear())})
    with pytest.raises(DataError, match="--background nowhite: is no colour; pass a name, #rrggbb, or none"):
        open_source(tmp_path, background="nowhite")


def test_only_the_first_frame_is_taken_and_that_is_said(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    write_folder(tmp_path, {"1.gif": encoded(frames[0], "gif", save_all=True, append_images=frames[1:])})
    found, source = loaded(tmp_path)
    assert (found == 10).all() and source.looks["of several frames, of which the first is taken"] == 1


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_several_sizes_are_refused_before_there_is_a_folder(tmp_path, capsys):
    images = {f"{i}.png": encoded(noise(8, 8)) for i in range(5)} | {"9.png": encoded(noise(8, 9))}
    for path in (write_folder(tmp_path / "set", images), write_tar(tmp_path / "set.tgz", images, "")):
        with pytest.raises(DataError, match=r"9\.png: is 3x8x9, those before are 3x8x8; pass --size to .*2 sizes"):
            main([str(path), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        assert loaded(path, size=4)[0].shape == (6, 3, 4, 4)


def test_parquet_is_looked_at_as_well(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, cells in {
        "sizes": [noise(8, 8), noise(9, 8)],
        "kinds": [noise(8, 8), grey(0)],
        "clear": [half_clear()],
    }.items():
        pq.write_table(
            pa.table({"image": [{"bytes": encoded(c), "path": ""} for c in cells]}), tmp_path / f"{name}.parquet"
        )
    for name, message in {"sizes": "pass --size", "kinds": "pass --channels", "clear": "pass --background"}.items():
        with pytest.raises(DataError, match=message):
            open_source(tmp_path / f"{name}.parquet")
