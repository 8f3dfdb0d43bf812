"""Glyphs: Unicode characters drawn from the fonts that matplotlib brings along; no download.

The classes are characters whose shapes stay apart in all upright fonts, even stretched to one height and width: one A
stands for the Latin, the Greek and the Cyrillic letter. The instances are fonts and affine changes, drawn in whole
numbers, so that the same matplotlib and Pillow draw the same bytes on every machine. Matplotlib is imported where it is
asked for: it is wanted for nothing else.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import PIL
from PIL import Image, ImageFont

from hdml_core.config import DataConfig
from hdml_core.datasets.base import Sample, Source
from hdml_core.datasets.cache import image_decoder

CHARACTERS = (
    "!#$%&*+0234567<>@ACEJKLMPQRTUVWXZbdfgkmry¢£¥§«±¶¿ÆæøŒŧƁƄƇƋƑƔƕƝƣƤƦƪƫƳƸƺƾȜȡȤȴ"
    "ȵȸȹȻȾȿɀɃɕɖɚɠɧɬɮɱɻɿʇʍʎʐʑʔʕʛʞʤʨʩʪʫʬʭʮʯΞΣΦαβζηλμνπςωϗϙϝϞϟϠϷϻϼЉЊЋЖЛЦЧЩЪЫЮѣҐҕҗҘҚ"
    "ҤҬҲӋӶԳԴԶԷԸԹԾՀՁՃՆՊՌՎՐՒՖիխձմչջֆდოპრტფჭჯჴᴞᵻ‡‰⁋₣₧€₯₸₹↔↖↗↘↙↜↝↡↢↣↨↩↪↯↰↱↲↳↶↷↸↹↺↻↽↾"
    "↿⇀⇁⇄⇆⇈⇐⇖⇗⇠⇥⇧⇫⇱⇳⇸∓√∠∩∸∹∺≂≃≐≒≤≥⊆⊏⊡⊢⋄⌂⌘⌥⍽▲▷▽◌◐◓◔◜◝◟◢◣◧◨◬◭◸◺☀☹☼☿♀♁♂♃♅♆♡♤♧♩♫♬♭♮⟆"
)
INSTANCES = 20
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Computer Modern: its fonts hold other things than they say wherever it is not a letter or digit of ASCII.
ASCII_FONTS = ("cmr10", "cmss10", "cmtt10", "cmb10", "cmti10")

CANVAS = 96
EXTENT = 52
"""Longer side of an unaltered glyph on its canvas."""
ROTATION, SHEAR, STRETCH, SIZE, SHIFT = 0.4, 0.3, 0.25, 0.2, 6.0
"""The most that an instance departs from the unaltered glyph; the last in pixels of the canvas."""


def read(config: DataConfig, root: Path) -> Source:
    """Describe the drawings; every other character trains, so that each side has letters and symbols."""
    import matplotlib

    size, characters = config.image_size, sorted(CHARACTERS)
    # Whatever changes in this file may change the drawings, and then the cache must not be an old one.
    this_file = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def samples() -> Iterator[Sample]:
        for character in characters:
            fonts = fonts_with(character)
            for instance in range(INSTANCES):
                image = draw(character, fonts[instance % len(fonts)], instance)
                yield Sample(f"{character}/{instance:02d}", character, pgm(image))

    return Source(
        name="glyphs",
        place=fonts_folder(),
        identity=[f"{size} px", matplotlib.__version__, PIL.__version__, this_file],
        read=lambda: ((len(characters) * INSTANCES, 1, size, size), samples()),
        decode=image_decoder(size, channels=1),
        train_classes=lambda classes: range(0, len(classes), 2),
    )


def draw(character: str, font: str, instance: int) -> Image.Image:
    """Draw a character, bright on dark, altered as its instance number says."""
    mask = load_font(font).getmask(character)
    glyph = Image.frombytes("L", mask.size, bytes(mask))
    glyph = glyph.crop(glyph.getbbox())
    seed = hashlib.sha256(f"{character} {instance}".encode()).digest()
    rotation, shear, stretch, size, right, down = (byte / 127.5 - 1 for byte in seed[:6])
    scale = max(glyph.size) / EXTENT * (1 + SIZE * size)
    # From a pixel of the canvas to one of the glyph: nearest, so that no rounding depends on the machine.
    a, b = scale * (1 + STRETCH * stretch), scale * (ROTATION * rotation + SHEAR * shear)
    d, e = -scale * ROTATION * rotation, scale * (1 - STRETCH * stretch)
    x, y = CANVAS / 2 + SHIFT * right, CANVAS / 2 + SHIFT * down
    matrix = (a, b, glyph.width / 2 - a * x - b * y, d, e, glyph.height / 2 - d * x - e * y)
    return glyph.transform((CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def pgm(image: Image.Image) -> bytes:
    """Return the image as a portable graymap file: a line of text, then the pixels."""
    return f"P5 {image.width} {image.height} 255\n".encode() + image.tobytes()


def fonts_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def fonts_with(character: str) -> Sequence[str]:
    """Return the fonts that can draw this character."""
    fonts = [font for font, characters in fonts_and_characters().items() if ord(character) in characters]
    return [*fonts, *ASCII_FONTS] if character.isascii() and character.isalnum() else fonts


@cache
def fonts_and_characters() -> dict[str, frozenset[int]]:
    from matplotlib.ft2font import FT2Font

    return {font: frozenset(FT2Font(str(fonts_folder() / f"{font}.ttf")).get_charmap()) for font in FONTS}


@cache
def load_font(font: str) -> ImageFont.FreeTypeFont:
    # Pillow's own layout: the other one is a library that not every machine has.
    return ImageFont.truetype(fonts_folder() / f"{font}.ttf", CANVAS, layout_engine=ImageFont.Layout.BASIC)
