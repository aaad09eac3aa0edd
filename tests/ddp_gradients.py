"""Backward passes of both trainers' losses through DDP, as test_training.py compares them on one and two processes.

The same two image pairs are one batch of two on one process, or a batch of one on each of two.
"""
import sys
from types import SimpleNamespace

import torch
from accelerate import DistributedDataParallelKwargs, PartialState
from conftest import REPO  # noqa: F401  (puts the scripts on the path)
from safetensors.torch import save_file

import modules
import train_cyclegan
import train_unet


def gradients(compiled=False):
    """{name: gradient in double precision}, the same on every process."""
    accelerator, _ = modules.start_accelerator(SimpleNamespace(precision="fp32", seed=0))
    if compiled:  # in many small buckets, as large networks have them
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1024
        accelerator.ddp_handler = DistributedDataParallelKwargs(bucket_cap_mb=0.001)
    torch.set_default_dtype(torch.double)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    x, y = (images[accelerator.process_index::accelerator.num_processes] for images in (x, y))

    G_AB, G_BA, D_A, D_B, net = networks = (
        modules.ResnetGenerator(4, 1), modules.ResnetGenerator(4, 1), modules.DetailDiscriminator(4, sizes=2),
        modules.DetailDiscriminator(4, sizes=2), modules.UNet(4, depth=3))
    for generator in (G_AB, G_BA):  # at the identity, no gradient would reach the layers before the last
        torch.nn.init.normal_(generator.last[1].weight)
    for network in (G_AB, G_BA, net) if compiled else ():
        network.compile(dynamic=False)
    ddp_G_AB, ddp_G_BA, ddp_D_A, ddp_D_B, ddp_net = map(accelerator.prepare, networks)

    for D in (D_A, D_B):
        D.requires_grad_(False)
    loss, _, _, fake_A, fake_B = train_cyclegan.generator_loss(x, y, ddp_G_AB, ddp_G_BA, D_A, D_B, lambda_cycle=2)
    accelerator.backward(loss)
    for D in (D_A, D_B):
        D.requires_grad_(True)
    accelerator.backward(sum(
        train_cyclegan.discriminator_loss(D, real, fake)
        + 3 * train_cyclegan.gradient_penalty(D, torch.cat([real, fake]))
        for D, real, fake in ((ddp_D_A, x, fake_A.detach()), (ddp_D_B, y, fake_B.detach()))))

    perceptual = train_unet.perceptual_loss("random", accelerator.device)
    accelerator.backward(train_unet.paired_loss(x, y, ddp_net(x), "grad", perceptual)["loss"])
    torch.set_default_dtype(torch.float)
    return {f"{number}.{name}": parameter.grad for number, network in enumerate(networks)
            for name, parameter in network.named_parameters()}


def main(args):
    tensors, state = gradients(args.compiled), PartialState()
    assert state.num_processes == 2, "torchrun's processes do not train together"
    if state.is_main_process:
        save_file(tensors, args.out)


if __name__ == "__main__":
    modules.run_training(main, SimpleNamespace(out=sys.argv[1], compiled=sys.argv[2:] == ["compiled"]))
