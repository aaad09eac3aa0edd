"""Memory of a training step: counted without computing, and measured on a CPU to check the count.

    python tests/measured/training_memory.py                            # the table: GB at batch 1, 2, 4 in bf16
    python tests/measured/training_memory.py cyclegan 64 2 [fp32]        # one step for real: peak resident memory beside it

Counted: weights, gradients, Adam's two moments (and the average of the CycleGAN's head) in 32 bits; what autograd keeps
between the forward and the backward pass, each storage once; and the two largest of these once more, for the gradients that
the backward pass holds. The step is the CycleGAN's generator step or its discriminator step, whichever keeps more, or
the U-Net's with LPIPS (VGG).
"""
import copy
import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path[:0] = [str(Path(__file__).parents[2])]
import modules
import train_cyclegan
import train_unet


PERCEPTUAL = train_unet.perceptual_loss("random", torch.device("cpu"))


class Kept:
    """Counts the bytes that autograd keeps while it is active, parameters left out."""

    def __init__(self, *networks):
        self.ours = {p.untyped_storage()._cdata for n in networks for p in n.parameters()}
        self.storages = {}

    def pack(self, tensor):
        if tensor.untyped_storage()._cdata not in self.ours:
            self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(self.storages.values()) + sum(sorted(self.storages.values())[-2:])


def size_of(networks):
    return 4 * sum(p.numel() for network in networks for p in network.parameters())


def step(kind, size, batch, bf16):
    """Runs one training step; returns (bytes of weights and what belongs to them, bytes kept for the backward pass)."""
    def autocast():
        return torch.autocast("cpu", torch.bfloat16, bf16)

    x, y = torch.rand(2, batch, 3, size, size)
    if kind == "unet":
        net = modules.UNet()
        trunk = PERCEPTUAL.__closure__[0].cell_contents
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        with autocast(), Kept(net, trunk) as kept:
            loss = train_unet.paired_loss(x, y, net(x), "grad", PERCEPTUAL)["loss"]
        loss.backward()
        optimizer.step()
        return 4 * size_of([net]) + size_of([trunk]), kept.bytes

    G_AB, G_BA = modules.ResnetGenerator(), modules.ResnetGenerator()
    sizes = 1 + max(0, round(math.log(size / 32, 4)))
    D_A, D_B = modules.DetailDiscriminator(sizes=sizes), modules.DetailDiscriminator(sizes=sizes)
    networks = G_AB, G_BA, D_A, D_B
    average = copy.deepcopy(G_AB)
    adam_G = torch.optim.Adam([*G_AB.parameters(), *G_BA.parameters()], fused=True)
    adam_D = torch.optim.Adam([*D_A.parameters(), *D_B.parameters()], fused=True)
    for D in (D_A, D_B):
        D.requires_grad_(False)
    with autocast(), Kept(*networks) as generators:
        loss, _, _, fake_A, fake_B = train_cyclegan.generator_loss(x, y, G_AB, G_BA, D_A, D_B, 2)
    loss.backward()
    adam_G.step()
    adam_G.zero_grad()
    for D in (D_A, D_B):
        D.requires_grad_(True)
    fake_A, fake_B = fake_A.detach(), fake_B.detach()
    del loss
    with Kept(*networks) as discriminators:
        with autocast():
            loss = (train_cyclegan.discriminator_loss(D_A, x, fake_A) + train_cyclegan.discriminator_loss(D_B, y, fake_B))
        loss = loss + sum(train_cyclegan.gradient_penalty(D, torch.cat(images))
                          for D, images in ((D_A, (x, fake_A)), (D_B, (y, fake_B))))
    loss.backward()
    adam_D.step()
    return 4 * size_of(networks) + size_of([average]), max(generators.bytes, discriminators.bytes)


def resident(name):
    """Peak (VmHWM) or present (VmRSS) resident memory of this process in bytes."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


if sys.argv[1:]:
    kind, size, batch, *precision = sys.argv[1:]
    torch.set_num_threads(1)
    import lpips  # noqa: F401  (before the first look at the memory)
    before = resident("VmRSS")
    weights, kept = step(kind, int(size), int(batch), precision != ["fp32"])
    print(f"{kind} {size} px, batch {batch}: weights {weights / 1e9:.2f} GB + kept {kept / 1e9:.2f} GB = "
          f"{(weights + kept) / 1e9:.2f} GB; measured {(resident('VmHWM') - before) / 1e9:.2f} GB")
else:
    print("| | px | weights | batch 1 | 2 | 4 |\n| --- | --- | --- | --- | --- | --- |")
    for kind, name in (("cyclegan", "ESA-CycleGAN"), ("unet", "U-Net")):
        for size in (256, 512):
            with FakeTensorMode(allow_non_fake_inputs=True):
                counts = [step(kind, size, batch, True) for batch in (1, 2, 4)]
            print(f"| {name} | {size} | {counts[0][0] / 1e9:.2f} | "
                  + " | ".join(f"{sum(count) / 1e9:.1f}" for count in counts) + " |", flush=True)
