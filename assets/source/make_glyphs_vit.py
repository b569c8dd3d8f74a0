"""Pre-train a small timm ViT on rendered letters of open fonts and write its backbone to a safetensors file.

The network never sees a digit: it learns to name letters (Latin, Greek, Cyrillic, kana) that are rendered from fonts,
redrawn as pen strokes, bent, and brought to the 8x8 form of the UCI digits. One run goes through four steps:

1. render   every letter of every font once, as two distance fields (to the outline, to the skeleton);
2. clean    drop fonts whose letters do not look like letters (dingbats, frames, ...);
3. train    a ViT with a cosine head on freshly distorted letters, font families held out by a hash of their name;
4. report   held-out accuracy, then the class-mean accuracy on the digits, and write the weights.

    python assets/source/make_glyphs_vit.py --list-packages          # the Debian font packages that were used
    python assets/source/make_glyphs_vit.py --fonts /usr/share/fonts --out assets/glyphs_vit.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torchvision import transforms

MODEL_NAME = "vit_tiny_patch16_224"
# Patches of 8 (17 tokens): in the same training time far better on held-out fonts than patches of 4 (65 tokens).
MODEL_KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": 0}


def words(text: str) -> list[str]:
    """Split a table of words that would be hard to read as a list of quoted strings."""
    return text.split()


# One string per class; its characters share the label, because they share the shape once the glyph fills its box.
# Left out on purpose: all digits, and the Cyrillic letters that are drawn exactly like 3 and 6.
LATIN = words("A a B b Cc D d E e F f G g H h Il i J j K k L M m N n Oo Pp Q q R r Ss T t Uu Vv Ww Xx Y y Zz")
GREEK = words("Γ Δ Θ Λ Ξ Π Σ Φφ Ψψ Ω α β γ δ ε ζ η θ λ μ ξ π σ ω")
CYRILLIC = words("Д Ж И Ц Ч Ш Щ Ъ Ы Ь Э Ю Я")
HIRAGANA = list("あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらるれろわをん")
KATAKANA = list("アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフホマミムメモヤユヨラルレロワヲン")
TRAINED = LATIN + GREEK + CYRILLIC + HIRAGANA + KATAKANA
# Never trained on: these letters measure how well the features serve classes that the network has not met.
NOVEL = list("אבגדהזחטכלמנעפצקרשת") + list("აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ")
CLASSES = TRAINED + NOVEL

CANVAS, GLYPH = 48, 36  # pixels: side of the stored distance fields, longer side of the glyph inside them
OUTLINE_STEP, SKELETON_STEP = 12.0, 16.0  # stored units per pixel: both fields are kept as uint8
FONT_SUFFIXES = {".ttf", ".otf", ".ttc"}
FACES_PER_FAMILY = 4  # many weights of one family would drown the others
PACKAGES = words("""
fonts-adf-accanthis fonts-adf-baskervald fonts-adf-berenis fonts-adf-gillius fonts-adf-ikarius fonts-adf-irianis
fonts-adf-libris fonts-adf-mekanus fonts-adf-oldania fonts-adf-romande fonts-adf-solothurn fonts-adf-switzera
fonts-adf-tribun fonts-adf-universalis fonts-adf-verana fonts-aenigma fonts-aoyagi-kouzan-t fonts-aoyagi-soseki
fonts-apropal fonts-averia-gwf fonts-averia-sans-gwf fonts-averia-serif-gwf fonts-bajaderka fonts-blankenburg
fonts-breip fonts-bwht fonts-cabin fonts-cantarell fonts-century-catalogue fonts-cherrybomb fonts-comfortaa
fonts-comic-neue fonts-compagnon fonts-dancingscript fonts-dejavu-core fonts-dejavu-extra fonts-dejima-mincho
fonts-dkg-handwriting fonts-dosis fonts-dustin fonts-ebgaramond fonts-ecolier-court fonts-essays1743 fonts-eurofurence
fonts-f500 fonts-fantasque-sans fonts-femkeklaver fonts-freefont-otf fonts-georgewilliams fonts-gfs-artemisia
fonts-gfs-complutum fonts-gfs-didot fonts-gfs-gazis fonts-gfs-neohellenic fonts-gfs-olga fonts-gfs-porson
fonts-gfs-solomos fonts-gfs-theokritos fonts-havana fonts-humor-sans fonts-ipafont-gothic fonts-ipafont-mincho
fonts-joscelyn fonts-junction fonts-junicode fonts-jura fonts-kaushanscript fonts-kiloji fonts-klee fonts-komatuna
fonts-konatu fonts-kouzan-mouhitsu fonts-kristi fonts-lato fonts-le-murmure fonts-leckerli-one fonts-levien-typoscript
fonts-liberation2 fonts-linuxlibertine fonts-lobster fonts-lobstertwo fonts-migmix fonts-monapo fonts-monofur
fonts-mononoki fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-mplus fonts-nanum fonts-okolaks fonts-oldstandard
fonts-open-sans fonts-osifont fonts-paratype fonts-play fonts-quicksand fonts-radisnoir fonts-reggae
fonts-roboto-unhinted fonts-rocknroll fonts-routed-gothic fonts-rufscript fonts-sawarabi-gothic fonts-sawarabi-mincho
fonts-seto fonts-sil-andika fonts-sil-gentiumplus fonts-sjfonts fonts-smc-chilanka fonts-stick fonts-takao-gothic
fonts-tiresias fonts-tlwg-purisa-ttf fonts-tomsontalks fonts-umeplus fonts-urw-base35 fonts-vlgothic fonts-vollkorn
fonts-woowa-bm fonts-yozvox-yozfont-antique fonts-yozvox-yozfont-cute fonts-yozvox-yozfont-standard-kana
fonts-yusei-magic
""")


# ---------------------------------------------------------------------------------------------------------------------
# 1. render


@dataclass
class Glyphs:
    """Rendered letters: ``outline`` and ``skeleton`` uint8 ``[N, 48, 48]``, ``label`` and ``family`` int64 ``[N]``."""

    outline: Tensor
    skeleton: Tensor
    label: Tensor
    family: Tensor
    family_names: list[str]

    def subset(self, keep: Tensor) -> Glyphs:
        """Return the glyphs that ``keep`` (bool ``[N]`` or indices) selects."""
        return Glyphs(
            self.outline[keep], self.skeleton[keep], self.label[keep], self.family[keep], list(self.family_names)
        )


def find_fonts(folders: list[Path]) -> list[Path]:
    """Return the font files below ``folders``, sorted so that a rerun sees the same order."""
    found = {p.resolve() for folder in folders for p in folder.rglob("*") if p.suffix.lower() in FONT_SUFFIXES}
    if not found:
        listed = ", ".join(str(f) for f in folders)
        sys.exit(
            f"No font files (.ttf, .otf, .ttc) found below: {listed}\n"
            "On Debian, install the fonts that were used for the published weights and rerun:\n"
            f"  sudo apt-get install {' '.join(PACKAGES)}\n"
            "fonts-aenigma alone (465 fonts) is enough for a reduced run: sudo apt-get install fonts-aenigma"
        )
    return sorted(found, key=lambda p: (p.name, str(p)))


def draw_bitmap(font: ImageFont.FreeTypeFont, char: str) -> np.ndarray | None:
    """Draw ``char`` so that its longer side has 36 pixels, centred: bool ``[48, 48]``, or None if there is no ink."""
    left, top, right, bottom = font.getbbox(char)
    width, height = right - left, bottom - top
    if width < 4 or height < 4 or max(width, height) > 1000:
        return None
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).text((-left, -top), char, fill=255, font=font)
    box = picture.point(lambda v: 255 * (v > 127)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = GLYPH / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(picture, ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2))
    bitmap = np.asarray(canvas) > 127
    # Almost empty or almost full bitmaps are blanks or black boxes, not letters.
    return bitmap if 0.01 < bitmap.mean() < 0.5 else None


def thin(bitmaps: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning of bool bitmaps ``[N, H, W]`` (border pixels off) to one-pixel skeletons, same shape."""
    out = bitmaps.copy()
    active = np.arange(len(out))
    while len(active):
        block = out[active].astype(np.uint8)
        changed = np.zeros(len(active), dtype=bool)
        for first in (True, False):
            p = np.pad(block, ((0, 0), (1, 1), (1, 1)))
            n, s, w, e = p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:]
            nw, ne, sw, se = p[:, :-2, :-2], p[:, :-2, 2:], p[:, 2:, :-2], p[:, 2:, 2:]
            ring = [n, ne, e, se, s, sw, w, nw]
            count = sum(ring)
            turns = sum((a < b).astype(np.uint8) for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
            open_side = (n & e & s) | (e & s & w) if first else (n & e & w) | (n & s & w)
            drop = (block == 1) & (count >= 2) & (count <= 6) & (turns == 1) & (open_side == 0)
            changed |= drop.any(axis=(1, 2))
            block[drop] = 0
        out[active] = block.astype(bool)
        active = active[changed]
    return out


def distance_fields(bitmap: np.ndarray, skeleton: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 ``[H, W]`` signed distance to the outline (inside < 128) and distance to the skeleton."""
    outside, inside = distance_transform_edt(~bitmap), distance_transform_edt(bitmap)
    outline = np.clip(128 + OUTLINE_STEP * (outside - inside), 0, 255)
    to_skeleton = np.clip(SKELETON_STEP * distance_transform_edt(~skeleton), 0, 255)
    return outline.round().astype(np.uint8), to_skeleton.round().astype(np.uint8)


def same_shape(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether two bitmaps bool ``[H, W]`` are all but equal."""
    return (first ^ second).sum() < 0.06 * max(first.sum(), second.sum())


def face_bitmaps(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return a font's family name and the bitmaps of those of our characters that it really has."""
    font = ImageFont.truetype(str(path), 96)
    missing = draw_bitmap(font, "\U0010fffd")  # what this font shows for a character that it lacks
    bitmaps: dict[str, np.ndarray] = {}
    for char in "".join(CLASSES):
        bitmap = draw_bitmap(font, char)
        if bitmap is None or (missing is not None and same_shape(bitmap, missing)):
            continue
        # Small-caps and all-caps fonts draw "a" as "A"; the label of the copy would be wrong.
        capital = bitmaps.get(char.upper()) if char != char.upper() else None
        if capital is not None and same_shape(bitmap, capital) and class_of(char) != class_of(char.upper()):
            continue
        bitmaps[char] = bitmap
    # A font that shows one picture for everything (a blank box, a logo) teaches nothing.
    most_common = Counter(b.tobytes() for b in bitmaps.values()).most_common(1)
    return str(font.getname()[0]), bitmaps if most_common and most_common[0][1] <= 4 else {}


def class_of(char: str) -> int:
    """Return the index in CLASSES of the class that holds ``char``."""
    return next(i for i, members in enumerate(CLASSES) if char in members)


def render_face(path: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray] | None:
    """Render one font file: family, outline and skeleton fields uint8 ``[n, 48, 48]``, labels int64 ``[n]``."""
    try:
        family, bitmaps = face_bitmaps(path)
    except (OSError, ValueError, ArithmeticError):
        return None  # broken or bitmap-only font file
    if len(bitmaps) < 15:
        return None
    stack = np.stack(list(bitmaps.values()))
    fields = [distance_fields(b, s) for b, s in zip(stack, thin(stack), strict=True)]
    labels = np.array([class_of(char) for char in bitmaps], dtype=np.int64)
    return family, np.stack([f[0] for f in fields]), np.stack([f[1] for f in fields]), labels


def render_fonts(paths: list[Path], workers: int) -> Glyphs:
    """Render all fonts, at most four faces of each family."""
    with ProcessPoolExecutor(workers) as pool:
        faces = [face for face in pool.map(render_face, paths, chunksize=8) if face is not None]
    if not faces:
        sys.exit("None of the font files could be rendered; see --help and --list-packages.")
    used: Counter[str] = Counter()
    kept = []
    for face in faces:
        used[face[0]] += 1
        if used[face[0]] <= FACES_PER_FAMILY:
            kept.append(face)
    names = sorted(used)
    number = {name: i for i, name in enumerate(names)}
    return Glyphs(
        outline=torch.from_numpy(np.concatenate([f[1] for f in kept])),
        skeleton=torch.from_numpy(np.concatenate([f[2] for f in kept])),
        label=torch.from_numpy(np.concatenate([f[3] for f in kept])),
        family=torch.from_numpy(np.concatenate([np.full(len(f[3]), number[f[0]]) for f in kept])),
        family_names=names,
    )


# ---------------------------------------------------------------------------------------------------------------------
# 2. clean


def drop_unreadable(glyphs: Glyphs, share: float = 0.25) -> Glyphs:
    """Drop families of which less than ``share`` of the letters resemble the mean picture of their class."""
    pixels = F.adaptive_avg_pool2d((glyphs.skeleton < 3 * SKELETON_STEP).float()[:, None], 12).flatten(1)
    pixels = F.normalize(pixels - pixels.mean(0), dim=1)
    means = torch.zeros(len(CLASSES), pixels.shape[1]).index_add_(0, glyphs.label, pixels)
    scores = pixels @ F.normalize(means, dim=1).T
    right = (scores.topk(3, dim=1).indices == glyphs.label[:, None]).any(1).float()
    count = torch.bincount(glyphs.family, minlength=len(glyphs.family_names))
    score = torch.zeros(len(count)).index_add_(0, glyphs.family, right) / count.clamp(min=1)
    dropped = [name for name, s, c in zip(glyphs.family_names, score, count, strict=True) if c and s < share]
    print(f"dropped {len(dropped)} unreadable families: {', '.join(dropped[:12])}{' ...' if len(dropped) > 12 else ''}")
    return glyphs.subset(score[glyphs.family] >= share)


def is_held_out(family: str) -> bool:
    """Hold out about every twelfth family, by a hash of its name, so that a different font list changes little."""
    return zlib.crc32(family.encode()) % 12 == 0


# ---------------------------------------------------------------------------------------------------------------------
# 3. distort and train


def uniform(count: int, low: float, high: float) -> Tensor:
    """Return ``[count, 1, 1]`` uniform random numbers."""
    return torch.empty(count, 1, 1).uniform_(low, high)


def warp_grid(count: int) -> Tensor:
    """Random affine maps with a smooth random bend on top: sampling grid ``[count, 48, 48, 2]``."""
    turn = torch.randn(count) * 0.16
    lean = torch.randn(count) * 0.18
    stretch = torch.empty(count).uniform_(-0.25, 0.25).exp()
    cos, sin = turn.cos(), turn.sin()
    rows = [stretch * cos, lean * cos - sin, torch.zeros(count), sin, lean * sin + cos, torch.zeros(count)]
    grid = F.affine_grid(torch.stack(rows, 1).view(count, 2, 3), [count, 1, CANVAS, CANVAS], align_corners=False)
    # 5x5 random displacements blown up to the canvas: bends as of a hand, not noise.
    strength = torch.empty(count, 1, 1, 1).uniform_(0.0, 0.14)
    bend = F.interpolate(torch.randn(count, 2, 5, 5) * strength, size=CANVAS, mode="bicubic", align_corners=True)
    return grid + bend.permute(0, 2, 3, 1)


def ink(outline: Tensor, skeleton: Tensor) -> Tensor:
    """Bend letters and draw them with a random pen: uint8 fields ``[B, 48, 48]`` -> grey ``[B, 48, 48]`` in 0..1.

    Thresholding a distance field after the bend gives a clean stroke of any width; most letters are redrawn as pen
    strokes around their skeleton, the others keep the shape of the font, a little thinner or bolder.
    """
    count = len(outline)
    as_pen = torch.rand(count, 1, 1) < 0.65
    field = torch.where(as_pen, skeleton.float() / SKELETON_STEP, (outline.float() - 128) / OUTLINE_STEP)
    field = F.grid_sample(field[:, None], warp_grid(count), padding_mode="border", align_corners=False)[:, 0]
    reach = torch.where(as_pen, uniform(count, 1.0, 3.6), uniform(count, -1.2, 2.0))
    # Never thin a letter away: some ink must stay.
    reach = torch.maximum(reach, field.amin((1, 2), keepdim=True) + 1.0)
    return (reach - field + 0.5).clamp(0, 1)


def ink_box(grey: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the edges left, right, top, bottom (each ``[B]``, in pixels) of the ink in ``[B, H, W]``."""
    columns, rows = (grey > 0.5).any(1), (grey > 0.5).any(2)

    def edges(marks: Tensor) -> tuple[Tensor, Tensor]:
        first = marks.float().argmax(1)
        last = marks.shape[1] - marks.flip(1).float().argmax(1)
        return first.float(), last.float()

    return *edges(columns), *edges(rows)


def fill_box(grey: Tensor) -> Tensor:
    """Cut out the ink and let it fill a 32x32 box, as the UCI programs do: ``[B, 48, 48]`` -> ``[B, 32, 32]``."""
    count, side = len(grey), grey.shape[-1]
    left, right, top, bottom = ink_box(grey)
    width, height = (right - left).clamp(min=3.0), (bottom - top).clamp(min=3.0)
    longer = torch.maximum(width, height)
    # Either the proportions stay, or the height fills the box and the width takes a random share of it; slim letters
    # stay slim.
    share = torch.empty(count).uniform_(0.6, 1.0)
    wide = torch.where(width / height < 0.45, (width / height).clamp(min=0.12), share)
    keep = torch.rand(count) < 0.5
    share_x, share_y = torch.where(keep, width / longer, wide), torch.where(keep, height / longer, torch.ones(count))
    shrink = torch.where(torch.rand(count) < 0.5, torch.ones(count), torch.empty(count).uniform_(0.85, 1.0))
    scale_x, scale_y = width / side / (share_x * shrink), height / side / (share_y * shrink)
    centre_x, centre_y = (left + right) / side - 1, (top + bottom) / side - 1
    slack = torch.empty(2, count).uniform_(-1, 1)
    centre_x = centre_x + slack[0] * 0.5 * (1 - share_x * shrink) * scale_x
    centre_y = centre_y + slack[1] * 0.5 * (1 - share_y * shrink) * scale_y
    zero = torch.zeros(count)
    theta = torch.stack([scale_x, zero, centre_x, zero, scale_y, centre_y], 1).view(count, 2, 3)
    grid = F.affine_grid(theta, [count, 1, 32, 32], align_corners=False)
    return F.grid_sample(grey[:, None], grid, align_corners=False)[:, 0]


def resize_matrix(side: int) -> Tensor:
    """Return ``[32, side]``: bicubic resize of ``side`` pixels to 36 and the centre crop to 32, along one axis."""
    eye = torch.eye(side)[None, None]
    return F.interpolate(eye, size=(36, side), mode="bicubic", antialias=True, align_corners=False)[0, 0, 2:34]


def to_input(small: Tensor, matrix: Tensor) -> Tensor:
    """Resize and crop ``[B, s, s]`` to the network's ``[B, 32, 32]`` in 0..1."""
    return (matrix @ small @ matrix.T).clamp(0, 1)


def distort(outline: Tensor, skeleton: Tensor, only_8x8: bool = False) -> Tensor:
    """Turn distance fields ``[B, 48, 48]`` into network inputs ``[B, 3, 32, 32]``; 3 of 4 went through 8x8."""
    box = fill_box(ink(outline, skeleton))
    count = len(box)
    # The UCI form: a 32x32 bitmap, counted in 4x4 blocks, gives 8x8 whole numbers 0..16.
    counts = F.avg_pool2d((box > 0.5).float()[:, None], 4)[:, 0] * 16
    speckle = torch.randint(-1, 2, counts.shape) * (torch.rand(count, 1, 1) < 0.3) * (counts > 0)
    small = to_input((counts + speckle).clamp(0, 16) / 16, resize_matrix(8))
    if only_8x8:
        return small[:, None].repeat(1, 3, 1, 1)
    fine = to_input(box, resize_matrix(32))
    half = to_input(F.avg_pool2d(box[:, None], 2)[:, 0], resize_matrix(16))
    kind = torch.rand(count, 1, 1)
    image = torch.where(kind < 0.75, small, torch.where(kind < 0.87, half, fine))
    return (image * uniform(count, 0.7, 1.0))[:, None].repeat(1, 3, 1, 1)


class CosineHead(nn.Module):
    """Classifier by scaled cosines, so that the features suit nearest class means by cosine."""

    def __init__(self, width: int, classes: int, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, width]`` to logits ``[B, classes]``."""
        return self.scale * F.normalize(features.float(), dim=1) @ F.normalize(self.weight, dim=1).T


def sampling_weights(glyphs: Glyphs) -> Tensor:
    """Return ``[N]``: letters of one class are equally likely, a Latin class counts four times any other class."""
    size = torch.bincount(glyphs.label, minlength=len(CLASSES)).clamp(min=1)
    share = torch.ones(len(CLASSES))
    share[: len(LATIN)] = 4.0
    # Square root: a class with few fonts is not repeated as often as it would be with equal classes.
    return (share / size.float().sqrt())[glyphs.label].double()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))


def train(model: nn.Module, glyphs: Glyphs, args: argparse.Namespace) -> nn.Module:
    """Train ``model`` with a cosine head; return the running average of its weights."""
    head = CosineHead(model.num_features, len(TRAINED), args.scale)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": [*plain, head.weight], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    weights = sampling_weights(glyphs)
    start, running, hits = time.time(), 0.0, 0.0
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        pick = torch.multinomial(weights, args.batch, replacement=True)
        inputs, labels = distort(glyphs.outline[pick], glyphs.skeleton[pick]), glyphs.label[pick]
        logits = head(model(inputs))
        loss = F.cross_entropy(logits, labels, label_smoothing=args.smoothing)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        running += loss.item()
        hits += (logits.argmax(1) == labels).float().mean().item()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            done = (step % 100) + 1
            spent = time.time() - start
            print(f"step {step + 1:5d}  loss {running / done:.3f}  acc {hits / done:.3f}  {spent:.0f} s", flush=True)
            running, hits = 0.0, 0.0
    return average.module


# ---------------------------------------------------------------------------------------------------------------------
# 4. report


@torch.no_grad()
def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the class-token features ``[N, width]`` of inputs ``[N, 3, 32, 32]``."""
    model.eval()
    return torch.cat([model(chunk) for chunk in inputs.split(256)])


def class_mean_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of the nearest class mean by cosine; features ``[n, width]``, labels ``[n]``."""
    classes = train_y.unique()
    means = torch.stack([train_x[train_y == c].mean(0) for c in classes])
    nearest = (F.normalize(test_x, dim=1) @ F.normalize(means, dim=1).T).argmax(1)
    return (classes[nearest] == test_y).float().mean().item()


def glyph_sample(glyphs: Glyphs, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return distorted 8x8-style inputs and labels of at most ``most`` glyphs, the same for every call."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    pick = torch.randperm(len(glyphs.label))[:most]
    inputs = torch.cat([distort(glyphs.outline[p], glyphs.skeleton[p], only_8x8=True) for p in pick.split(256)])
    torch.set_rng_state(state)
    return inputs, glyphs.label[pick]


def report_glyphs(model: nn.Module, learnt: Glyphs, held_out: Glyphs, novel: Glyphs) -> dict[str, float]:
    """Class-mean accuracy on letters: Latin of held-out fonts, and scripts that the network has never met."""
    scores = {}
    train_x, train_y = glyph_sample(learnt.subset(learnt.label < len(LATIN)), 6000, 1)
    test_x, test_y = glyph_sample(held_out.subset(held_out.label < len(LATIN)), 3000, 2)
    scores["Latin letters, held-out fonts"] = class_mean_accuracy(
        features_of(model, train_x), train_y, features_of(model, test_x), test_y
    )
    if len(novel.label):
        # Ten distorted copies of each glyph; copies of a glyph may fall on both sides, the distortions differ.
        many = novel.subset(torch.arange(len(novel.label)).repeat(10))
        inputs, labels = glyph_sample(many, 6000, 3)
        feats, half = features_of(model, inputs), len(labels) // 2
        scores["untrained scripts"] = class_mean_accuracy(feats[:half], labels[:half], feats[half:], labels[half:])
    return scores


def split_digits(labels: np.ndarray) -> np.ndarray:
    """Return the fixed test mask bool ``[N]``: within each class, in file order, positions 2, 5, 8, ..."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[2::3]] = True
    return test


def digit_inputs(images: np.ndarray) -> Tensor:
    """Take digits uint8 ``[N, 8, 8]`` (0..16) the way of the demo to network inputs ``[N, 3, 32, 32]``."""
    path = transforms.Compose(
        [
            transforms.Resize(int(256 / 224 * 32), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
        ]
    )
    grey = np.round(images.astype(np.float64) * 255 / 16).astype(np.uint8)
    return torch.stack([path(Image.fromarray(image).convert("RGB")) for image in grey])


def report_digits(model: nn.Module, archive: Path, seed: int) -> dict[str, float]:
    """Class-mean accuracy on the digits: these weights, random ViTs of the same shape, and raw pixels."""
    data = np.load(archive)
    test = torch.from_numpy(split_digits(data["labels"]))
    labels, inputs = torch.from_numpy(data["labels"].astype(np.int64)), digit_inputs(data["images"])
    raw = torch.from_numpy(data["images"].astype(np.float32)).flatten(1)

    def score(x: Tensor) -> float:
        return class_mean_accuracy(x[~test], labels[~test], x[test], labels[test])

    randoms = []
    for offset in range(3):
        torch.manual_seed(seed + offset)
        randoms.append(score(features_of(timm.create_model(MODEL_NAME, **MODEL_KWARGS), inputs)))
    return {
        "digits, these weights": score(features_of(model, inputs)),
        "digits, random ViT (mean of 3)": float(np.mean(randoms)),
        "digits, raw pixels": score(raw),
    }


def write_weights(model: nn.Module, path: Path) -> None:
    """Store the backbone's state dict as fp16, by way of a temporary file so that readers never see half a file."""
    state = {name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    partial_file = path.with_suffix(".partial")
    save_file(state, partial_file, metadata={"format": "pt", "timm": MODEL_NAME, "kwargs": repr(MODEL_KWARGS)})
    partial_file.replace(path)


def half_precision(model: nn.Module) -> nn.Module:
    """Round the weights to fp16 and back: what is measured is what is stored."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float16).float())
    return model


def load_or_render(args: argparse.Namespace) -> Glyphs:
    """Render the fonts, or read the glyphs of an earlier run from ``--cache``."""
    if args.cache is not None and args.cache.exists():
        return Glyphs(**torch.load(args.cache, weights_only=True))
    paths = find_fonts(args.fonts)
    start = time.time()
    glyphs = render_fonts(paths, args.workers)
    print(f"rendered {len(glyphs.label)} glyphs of {len(paths)} font files in {time.time() - start:.0f} s", flush=True)
    if args.cache is not None:
        torch.save(vars(glyphs), args.cache)
    return glyphs


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Pre-train a small ViT on letters of open fonts (no digits) and write glyphs_vit.safetensors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    here = Path(__file__).resolve().parent.parent
    add = parser.add_argument
    add("--fonts", type=Path, nargs="+", default=[Path("/usr/share/fonts")], help="folders searched for fonts")
    add("--out", type=Path, default=here / "glyphs_vit.safetensors", help="weights file to write")
    add("--digits", type=Path, default=here / "digits.npz", help="digits for the last report; never trained on")
    add("--steps", type=int, default=3000, help="training steps")
    add("--batch", type=int, default=256, help="letters per step")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--scale", type=float, default=20.0, help="scale of the cosine head")
    add("--smoothing", type=float, default=0.0, help="label smoothing")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--workers", type=int, default=2, help="processes that render, and threads that train")
    add("--cache", type=Path, default=None, help="file that keeps the rendered glyphs for the next run")
    add("--list-packages", action="store_true", help="print the Debian font packages and stop")
    return parser.parse_args()


def main() -> None:
    """Render, clean, train, report, write."""
    args = parse_args()
    if args.list_packages:
        print("\n".join(PACKAGES))
        return
    torch.set_num_threads(args.workers)
    torch.manual_seed(args.seed)
    start = time.time()
    glyphs = drop_unreadable(load_or_render(args))
    out = torch.tensor([is_held_out(name) for name in glyphs.family_names])[glyphs.family]
    known = glyphs.label < len(TRAINED)
    learnt, held_out, novel = glyphs.subset(known & ~out), glyphs.subset(known & out), glyphs.subset(~known)
    families = [len(part.family.unique()) for part in (learnt, held_out)]
    print(
        f"letters: {len(learnt.label)} of {families[0]} families to learn, "
        f"{len(held_out.label)} of {families[1]} families held out, {len(novel.label)} of untrained scripts"
    )
    model = timm.create_model(MODEL_NAME, **MODEL_KWARGS)
    model = half_precision(train(model, learnt, args))
    scores = report_glyphs(model, learnt, held_out, novel)
    write_weights(model, args.out)
    if args.digits.exists():
        scores |= report_digits(model, args.digits, args.seed)
    for name, value in scores.items():
        print(f"{name}: {100 * value:.1f} %")
    print(f"{args.out}: {args.out.stat().st_size} bytes, sha256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")
    print(f"total {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
