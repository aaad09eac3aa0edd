"""Memory of a training step: counted without computing, and measured on a CPU to check the count.

    python tests/measured/training_memory.py                       # the table: GB at batch 1, 2, 4 in bf16 on a GPU
    python tests/measured/training_memory.py cyclegan 128 1        # one step for real, in 32 bits on this CPU

Counted: weights, gradients, Adam's two moments (and the average of the CycleGAN's head) in 32 bits; what autograd keeps
between forward and backward pass, each storage once; and the two largest of these once more, for the gradients that the
backward pass holds. The step is the CycleGAN's generator step, which keeps more than its discriminators', or the
U-Net's with LPIPS (VGG). Not counted: cuDNN's workspace and CUDA itself (about 1 GB, not measured here), nor what
torch.compile saves.
"""
import math
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path[:0] = [str(Path(__file__).parents[2])]
import modules
import train_cyclegan
import train_unet


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


def step(kind, size, batch, compute):
    """One training step, or its forward pass; returns (bytes of weights and what belongs to them, bytes kept)."""
    x, y = torch.rand(2, batch, 3, size, size)
    if kind == "unet":
        net, perceptual = modules.UNet(), train_unet.perceptual_loss("random", "cpu")
        trunk = perceptual.__closure__[0].cell_contents
        for layer in trunk.modules():  # LPIPS makes two constants on the CPU whatever the device
            layer._buffers = {key: value.to(x.device) for key, value in layer._buffers.items()}
        with Kept(net, trunk) as kept:
            loss = train_unet.paired_loss(x, y, net(x), "grad", perceptual)["loss"]
        if compute:
            loss.backward()
            torch.optim.Adam(net.parameters(), fused=True).step()
        return 4 * size_of([net]) + size_of([trunk]), kept.bytes

    sizes = 1 + int(math.log(size / 16, 4))
    G_AB, G_BA = modules.ResnetGenerator(), modules.ResnetGenerator()
    D_A, D_B = (modules.DetailDiscriminator(sizes=sizes) for _ in "AB")
    for D in (D_A, D_B):
        D.requires_grad_(False)
    with Kept(G_AB, G_BA, D_A, D_B) as kept:
        loss, _, _, fake_A, fake_B = train_cyclegan.generator_loss(x, y, G_AB, G_BA, D_A, D_B, 2)
    if compute:
        loss.backward()
        torch.optim.Adam([*G_AB.parameters(), *G_BA.parameters()], fused=True).step()
        fake_A, fake_B, loss = fake_A.detach(), fake_B.detach(), 0
        for D, real, fake in ((D_A, x, fake_A), (D_B, y, fake_B)):
            D.requires_grad_(True)
            loss = loss + train_cyclegan.discriminator_loss(D, real, fake)
            loss = loss + train_cyclegan.gradient_penalty(D, torch.cat([real, fake]))
        loss.backward()
    return 4 * size_of([G_AB, G_BA, D_A, D_B]) + size_of([G_AB]), kept.bytes


def resident(name):
    """Peak (VmHWM) or present (VmRSS) resident memory of this process in bytes."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


if sys.argv[1:]:
    kind, size, batch = sys.argv[1:]
    torch.set_num_threads(1)
    before = resident("VmRSS")
    weights, kept = step(kind, int(size), int(batch), compute=True)
    print(f"{kind} {size} px, batch {batch}: weights {weights / 1e9:.2f} GB + kept {kept / 1e9:.2f} GB = "
          f"{(weights + kept) / 1e9:.2f} GB; measured {(resident('VmHWM') - before) / 1e9:.2f} GB")
else:
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would ask whether there is a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.nn.Module.to = lambda network, *args, **options: network  # no tensor moves that is not there
    print("| | px | weights | batch 1 | 2 | 4 |\n| --- | --- | --- | --- | --- | --- |")
    for kind, name in (("cyclegan", "ESA-CycleGAN"), ("unet", "U-Net")):
        for size in (256, 512):
            with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
                counts = [step(kind, size, batch, compute=False) for batch in (1, 2, 4)]
            print(f"| {name} | {size} | {counts[0][0] / 1e9:.2f} | "
                  + " | ".join(f"{sum(count) / 1e9:.1f}" for count in counts) + " |", flush=True)
