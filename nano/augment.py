"""Views of the training images: style, geometry and background, batched on the training device.

`strength` runs from 0 (a clean render on white) to 1 and is given per view, so that a batch can mix both. No
noise, blur, fog, pixelation or compression: those are what nano's robustness is measured on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)


def uniform(like: Tensor, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers on the device of `like`, one row per view."""
    return torch.empty(len(like), *shape, device=like.device).uniform_(low, high)


def chance(strength: Tensor, probability: float) -> Tensor:
    """Which views get an effect: at most `probability`, less where strength is low."""
    return torch.rand_like(strength) < probability * strength


def colour_matrix(strength: Tensor, keep_hue: Tensor) -> Tensor:
    """A random change of hue, saturation, contrast and colour balance, (N, 3, 3)."""
    device = strength.device
    angle = uniform(strength, -1, 1) * strength * torch.where(chance(strength, 0.15), 3.1, 0.35)
    angle = torch.where(keep_hue, angle * 0.1, angle)
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    axis = torch.full((3, 3), 1 / 3, device=device)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / 3**0.5
    hue = torch.eye(3, device=device) * cos + axis * (1 - cos) + cross * sin
    grey = torch.tensor(GREY, device=device).expand(3, 3)
    saturation = 1 + uniform(strength, -0.6, 0.6) * strength
    saturation = torch.where(chance(strength, 0.12), torch.zeros_like(saturation), saturation)
    saturation = torch.where(keep_hue, saturation.clamp(min=0.8), saturation)[:, None, None]
    balance = 1 + uniform(strength, -0.25, 0.25, 3, 1) * (strength * (~keep_hue))[:, None, None]
    contrast = 1 + uniform(strength, -0.3, 0.3)[:, None, None] * strength[:, None, None]
    return balance * contrast * (saturation * torch.eye(3, device=device) + (1 - saturation) * grey) @ hue


def restyle(art: Tensor, strength: Tensor, keep_hue: Tensor) -> Tensor:
    """Another hand's colours and lines on premultiplied artwork, (N, 4, H, W)."""
    colour, alpha = art[:, :3], art[:, 3:]
    matrix = colour_matrix(strength, keep_hue)
    offset = uniform(strength, -0.12, 0.12, 1, 1, 1) * strength[:, None, None, None]
    colour = torch.einsum("nij,njhw->nihw", matrix, colour) + offset * alpha
    levels = uniform(strength, 3, 7, 1, 1, 1).round()
    flat = torch.where(chance(strength, 0.2)[:, None, None, None], (colour * levels).round() / levels, colour)
    art = torch.cat([flat.clamp(0, 1) * alpha, alpha], dim=1)
    return outline(art, chance(strength, 0.2))


def outline(art: Tensor, chosen: Tensor) -> Tensor:
    """A line of one colour around the drawing and along its inner edges."""
    drawn = art[chosen]
    if not len(drawn):
        return art
    wide = F.max_pool2d(drawn, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-drawn, 3, stride=1, padding=1)
    edge = ((wide - thin).amax(dim=1, keepdim=True) * 2.5 - 0.5).clamp(0, 1)
    ink = uniform(drawn, 0, 0.3, 3, 1, 1)
    colour = drawn[:, :3] * (1 - edge) + ink * edge
    art = art.clone()
    art[chosen] = torch.cat([colour, torch.maximum(drawn[:, 3:], edge)], dim=1)
    return art


def affine(strength: Tensor, flip: bool = True) -> Tensor:
    """Random scale, aspect, rotation, shear, shift and mirror, as (N, 2, 3) maps from output to input."""
    angle = uniform(strength, -0.45, 0.45) * strength
    zoom = 1 / (1 + uniform(strength, -0.5, 0.15) * strength)
    aspect = 1 + uniform(strength, -0.2, 0.2) * strength
    shear = uniform(strength, -0.2, 0.2) * strength
    mirror = torch.where(torch.rand_like(strength) < 0.5, -1.0, 1.0) if flip else torch.ones_like(strength)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([zoom * aspect * cos * mirror, zoom * (shear - sin)], dim=1),
        torch.stack([zoom * sin * mirror, zoom / aspect * cos], dim=1),
    ]
    reach = (zoom - 0.8).clamp(min=0.05)[:, None]
    shift = uniform(strength, -1, 1, 2) * strength[:, None] * reach
    return torch.cat([torch.stack(rows, dim=1), shift[:, :, None]], dim=2)


def backgrounds(art: Tensor, strength: Tensor) -> Tensor:
    """White, plain, graded, cloudy or drawn backgrounds, (N, 3, H, W)."""
    pick = torch.rand_like(strength)[:, None, None, None]
    coarse = uniform(art, 0, 1, 3, 6, 6)
    graded = F.interpolate(coarse[..., :2, :2], (6, 6), mode="bilinear", align_corners=True)
    coarse = torch.where(pick < 0.25, coarse[..., :1, :1], torch.where(pick < 0.5, graded, coarse))
    image = F.interpolate(coarse, art.shape[-2:], mode="bilinear", align_corners=True)
    drawn = pick.flatten() > 0.75
    image[drawn] = 0.6 * image[drawn] + 0.4 * art.roll(1, dims=0)[drawn, :3]
    shown = uniform(art, 0, 1, 1, 1, 1) * chance(strength, 0.7)[:, None, None, None]
    return 1 - shown * (1 - image)


def occlude(image: Tensor, strength: Tensor) -> Tensor:
    """Cover a small box of some views with one colour."""
    height, width = image.shape[-2:]
    rows = torch.arange(height, device=image.device)[None, None, :, None]
    columns = torch.arange(width, device=image.device)[None, None, None, :]
    top, left = uniform(image, 0, height, 1, 1, 1), uniform(image, 0, width, 1, 1, 1)
    side = uniform(image, 0.1, 0.35, 2, 1, 1) * height
    inside = (rows >= top) & (rows < top + side[:, :1]) & (columns >= left) & (columns < left + side[:, 1:])
    inside = inside & chance(strength, 0.25)[:, None, None, None]
    return torch.where(inside, uniform(image, 0, 1, 3, 1, 1), image)


def view_artwork(renders: Tensor, strength: Tensor, keep_hue: Tensor) -> Tensor:
    """Augmented views of RGBA renders, uint8 (N, H, W, 4) to float (N, 3, H, W) in [0, 1]."""
    art = renders.permute(0, 3, 1, 2).float() / 255
    art = torch.cat([art[:, :3] * art[:, 3:], art[:, 3:]], dim=1)
    art = restyle(art, strength, keep_hue)
    grid = F.affine_grid(affine(strength), list(art.shape), align_corners=False)
    art = F.grid_sample(art, grid, padding_mode="zeros", align_corners=False)
    image = art[:, :3] + (1 - art[:, 3:]) * backgrounds(art, strength)
    return occlude(image, strength).clamp(0, 1)


def view_shapes(images: Tensor, strength: Tensor) -> Tensor:
    """Augmented views of easy-VQA images, uint8 (N, H, W, 3) to float (N, 3, H, W): moved, never recoloured."""
    image = images.permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(affine(strength * 0.3), list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    gain = 1 + uniform(strength, -0.05, 0.05, 1, 1, 1) * strength[:, None, None, None]
    return (image * gain).clamp(0, 1)
