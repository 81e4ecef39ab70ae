"""DINOv2's forward pass written from its paper and the documentation of its weights: no timm, no modules.

Takes a state dict with the published names. Attention is PyTorch's fused one, or spelt out.
"""

import torch
import torch.nn.functional as F

SIZES = {"s": (384, 6, 12), "b": (768, 12, 12), "l": (1024, 16, 24), "g": (1536, 24, 40)}
"""Letter to width, heads and blocks."""


def random_state(letter, registers=0, blocks=None, seed=0):
    """A state dict of the published names and shapes; LayerScale near 1, so that no block is idle."""
    width, _, depth = SIZES[letter]
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.02):
        return torch.randn(*shape, generator=rng) * std

    state = {
        "cls_token": normal(1, 1, width, std=0.5),
        "pos_embed": normal(1, 1 + 37 * 37, width, std=0.5),
        "mask_token": normal(1, width),
        "patch_embed.proj.weight": normal(width, 3, 14, 14),
        "patch_embed.proj.bias": normal(width),
        "norm.weight": 1 + normal(width, std=0.1),
        "norm.bias": normal(width, std=0.1),
    }
    if registers:
        state["register_tokens"] = normal(1, registers, width, std=0.5)
    for block in range(blocks or depth):
        name = f"blocks.{block}."
        for part in ("norm1", "norm2"):
            state[f"{name}{part}.weight"] = 1 + normal(width, std=0.1)
            state[f"{name}{part}.bias"] = normal(width, std=0.1)
        state[f"{name}attn.qkv.weight"], state[f"{name}attn.qkv.bias"] = normal(3 * width, width), normal(3 * width)
        state[f"{name}attn.proj.weight"], state[f"{name}attn.proj.bias"] = normal(width, width), normal(width)
        state[f"{name}ls1.gamma"], state[f"{name}ls2.gamma"] = 1 + normal(width), 1 + normal(width)
        if letter == "g":
            hidden = 4096
            state[f"{name}mlp.w12.weight"], state[f"{name}mlp.w12.bias"] = normal(2 * hidden, width), normal(2 * hidden)
            state[f"{name}mlp.w3.weight"], state[f"{name}mlp.w3.bias"] = normal(width, hidden), normal(width)
        else:
            state[f"{name}mlp.fc1.weight"], state[f"{name}mlp.fc1.bias"] = normal(4 * width, width), normal(4 * width)
            state[f"{name}mlp.fc2.weight"], state[f"{name}mlp.fc2.bias"] = normal(width, 4 * width), normal(width)
    return state


def positions(table, grid, registers):
    """Bicubic: by the scale (grid + 0.1) / 37 without, to the very size and antialiased with registers."""
    width = table.shape[-1]
    if grid == 37:
        return table
    square = table[:, 1:].reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    if registers:
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        scale = float(grid + 0.1) / 37
        square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    assert square.shape[-2:] == (grid, grid)
    return torch.cat([table[:, :1], square.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)


def features(state, x, heads, fused=True):
    """Output of every block for normalised images x (b, 3, r, r), and the final norm of the last: each (b, c, g, g)."""
    width, registers = state["norm.weight"].shape[0], state.get("register_tokens")
    batch, grid = len(x), x.shape[-1] // 14

    def norm(tokens, name):
        return F.layer_norm(tokens, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(tokens, name):
        return F.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(tokens, name):
        qkv = linear(tokens, f"{name}.qkv").reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * (width // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return linear(mixed.transpose(1, 2).reshape(batch, -1, width), f"{name}.proj")

    def mlp(tokens, name):
        if f"{name}.w12.weight" in state:
            gate, value = linear(tokens, f"{name}.w12").chunk(2, dim=-1)
            return linear(F.silu(gate) * value, f"{name}.w3")
        return linear(F.gelu(linear(tokens, f"{name}.fc1")), f"{name}.fc2")

    def square(tokens):
        first = 1 + (0 if registers is None else registers.shape[1])
        return tokens[:, first:].transpose(1, 2).reshape(batch, width, grid, grid)

    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    tokens = torch.cat([state["cls_token"].expand(batch, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + positions(state["pos_embed"], grid, registers is not None)
    if registers is not None:
        tokens = torch.cat([tokens[:, :1], registers.expand(batch, -1, -1), tokens[:, 1:]], dim=1)
    blocks, number = [], 0
    while f"blocks.{number}.norm1.weight" in state:
        name = f"blocks.{number}"
        tokens = tokens + attention(norm(tokens, f"{name}.norm1"), f"{name}.attn") * state[f"{name}.ls1.gamma"]
        tokens = tokens + mlp(norm(tokens, f"{name}.norm2"), f"{name}.mlp") * state[f"{name}.ls2.gamma"]
        blocks.append(square(tokens))
        number += 1
    return blocks, square(norm(tokens, "norm"))
