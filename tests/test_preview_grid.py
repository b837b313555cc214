"""The labelled picture of a preview, and its small one: what is where, and that any prompt can be written."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_forge.effect.of_file import Prompt
from lora_forge.preview.grid import grid, thumbnail
from lora_forge.preview.labels import Font, shortened, wrapped
from lora_forge.preview.render import Picture, Preview, difference

HOSTILE = [
    "一只蒸汽朋克猫头鹰" * 40,
    "🦉👩‍👩‍👧‍👦🏳️‍🌈",
    "שלום עולם, مرحبا بالعالم",
    "a\nb\tc\x1b[31m\0d\u2028e\u202ef",
    "half a letter: \ud83e",
    "x" * 5000,
    "word " * 5000,
    "",
    "\u0301" * 50,
]


def preview(
    prompts: list[Prompt], *, seeds: tuple[int, ...] = (0,), size: tuple[int, int] = (64, 64), strengths: Any = (0, 1)
) -> Preview:
    """Every image of one colour of its own."""
    pictures: list[Picture] = []
    for prompt in prompts:
        for seed in seeds:
            for strength in strengths:
                number = len(pictures)
                image = Image.new("RGB", size, (40 + 20 * number % 200, 255 - 11 * number % 255, 90))
                pictures.append(Picture(prompt, seed, strength, image, 12.5 * strength))
    return Preview(tuple(prompts), seeds, strengths, 2, 5.0, size, tuple(pictures))


def places(image: Image.Image, color: Any) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of a colour, and that these are the whole rectangle."""
    rows, columns = np.nonzero((np.asarray(image) == color).all(axis=2))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def test_strengths_are_columns_and_prompts_by_seeds_are_rows_each_image_whole_and_none_over_another() -> None:
    made = preview([Prompt("training", "an owl"), Prompt("control", "a bowl")], seeds=(0, 7), strengths=(0, 0.5, 1))
    image = grid(made)
    found = [places(image, one.image.getpixel((0, 0))) for one in made.pictures]
    columns, rows = [found[at][0] for at in range(3)], [found[at][1] for at in range(0, 12, 3)]
    assert columns == sorted(set(columns))
    assert rows == sorted(set(rows))
    for at, (left, top, right, bottom) in enumerate(found):
        assert (left, top) == (columns[at % 3], rows[at // 3])
        assert (right - left, bottom - top) == (192, 192)  # three times as large, pixel by pixel
        assert 0 < right < image.width
        assert 0 < bottom < image.height
    assert rows[2] - rows[1] > rows[1] - rows[0]  # there is the next prompt in words


def test_large_images_are_shown_pixel_for_pixel() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 256, 3), dtype=np.uint8)
    prompt = Prompt("training", "an owl")
    pictures = tuple(Picture(prompt, 0, strength, Image.fromarray(noise), 0.0) for strength in (0, 1))
    image = np.asarray(grid(Preview((prompt,), (0,), (0, 1), 2, None, (256, 200), pictures)))
    corners = np.argwhere((image == noise[0, 0]).all(axis=2))
    found = [(y, x) for y, x in corners if np.array_equal(image[y : y + 200, x : x + 256], noise)]
    assert len(found) == 2


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:6]))
def test_any_prompt_can_be_written_in_at_most_three_lines_that_fit(text: str) -> None:
    font = Font(14)
    lines = wrapped(f"training prompt: {text}", font, 300, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.width(line) <= 300 for line in lines)
    grid(preview([Prompt("training", text, text)], seeds=(0, 2**63 - 1)))


def test_a_prompt_that_is_too_long_is_cut_with_an_ellipsis_and_one_that_fits_is_whole() -> None:
    font = Font(14)
    words = "an owl of brass and gears on a branch"
    assert " ".join(wrapped(words, font, 120, 9)) == words
    cut = wrapped(words, font, 120, 2)
    assert len(cut) == 2
    assert cut[1].endswith("...")
    assert words.startswith(" ".join(cut).removesuffix("...").strip())
    assert shortened("owl", font, 500) == "owl"
    assert shortened("an owl of brass", font, 60).endswith("...")


def test_letters_that_no_font_here_has_are_written_as_escapes_and_never_as_empty_boxes() -> None:
    """U+10FFFE is no character, so that no font has it, and two of them are drawn like their escapes."""
    font = Font(16)
    assert font.width("\U0010fffe") == font.width(r"\U0010fffe")
    assert font.width("owl") < font.width("\U0010fffe")


def test_a_thumbnail_is_a_small_jpeg_even_of_noise_and_keeps_the_proportions() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), dtype=np.uint8)
    for image, size in [
        (Image.fromarray(noise), (256, 128)),
        (Image.fromarray(noise[:300, :300]), (256, 256)),
        (Image.new("RGBA", (64, 32)), (64, 32)),
    ]:
        data = thumbnail(image)
        assert len(data) < 40_000
        opened = Image.open(io.BytesIO(data))
        assert (opened.format, opened.size) == ("JPEG", size)


def test_the_difference_is_the_mean_over_pixels_and_colours_in_percent_of_the_range() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    red = black.copy()
    red[..., 0] = 255
    assert difference(black, black) == 0
    assert difference(black, white) == difference(white, black) == pytest.approx(100)
    assert difference(red, black) == pytest.approx(100 / 3)
