"""Run by test_training.py under torchrun: backward passes of one trainer's losses through DDP, gradients to argv[2].

The same two image pairs are one batch of two on one process, or a batch of one on each of two.
"""
import sys
from types import SimpleNamespace

import torch
from accelerate import DistributedDataParallelKwargs
from conftest import REPO  # noqa: F401  (puts the scripts on the path)
from safetensors.torch import save_file

import modules
import train_cyclegan
import train_unet


def main(trainer, target, processes, compiled):
    accelerator, _ = modules.start_accelerator(SimpleNamespace(precision="fp32", seed=0))
    assert accelerator.num_processes == processes, "torchrun's processes do not train together"
    if compiled:  # in many small buckets, as large networks have them
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1024
        accelerator.ddp_handler = DistributedDataParallelKwargs(bucket_cap_mb=0.001)

    def prepare(*networks):
        for network in networks:
            if compiled:
                network.compile(dynamic=False)
        return [accelerator.prepare(network) for network in networks]

    torch.set_default_dtype(torch.double)
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    share = slice(accelerator.process_index, 2, processes)

    if trainer == "train_cyclegan.py":
        G_AB, G_BA = modules.ResnetGenerator(4, 1), modules.ResnetGenerator(4, 1)
        for G in (G_AB, G_BA):  # at the identity, no gradient would reach the layers before the last
            torch.nn.init.normal_(G.last[1].weight)
        D_A, D_B = modules.DetailDiscriminator(4, sizes=2), modules.DetailDiscriminator(4, sizes=2)
        ddp_D_A, ddp_D_B = accelerator.prepare(D_A), accelerator.prepare(D_B)  # never compiled
        networks = G_AB, G_BA, *_ = *prepare(G_AB, G_BA), ddp_D_A, ddp_D_B
        for D in (D_A, D_B):
            D.requires_grad_(False)
        loss, _, _, fake_A, fake_B = train_cyclegan.generator_loss(x[share], y[share], G_AB, G_BA, D_A, D_B, lambda_cycle=2)
        accelerator.backward(loss)
        for D in (D_A, D_B):
            D.requires_grad_(True)
        loss = 0
        for D, real, fake in ((ddp_D_A, x[share], fake_A.detach()), (ddp_D_B, y[share], fake_B.detach())):
            loss = loss + train_cyclegan.discriminator_loss(D, real, fake)
            loss = loss + train_cyclegan.gradient_penalty(D, torch.cat([real, fake]))
        accelerator.backward(loss)
    else:
        networks = net, = prepare(modules.UNet(4, depth=3))
        perceptual = train_unet.perceptual_loss("random", accelerator.device)
        accelerator.backward(train_unet.paired_loss(x[share], y[share], net(x[share]), "grad", perceptual)[0])

    gradients = {f"{number}.{name}": parameter.grad for number, network in enumerate(networks)
                 for name, parameter in accelerator.unwrap_model(network).named_parameters()}
    if accelerator.is_main_process:
        save_file(gradients, target)
    accelerator.wait_for_everyone()
    accelerator.end_training()


# In a function: DDP networks that were globals would keep gloo's threads alive into the end of the interpreter, where
# one that asks for the GIL aborts the process (pytorch pull request 179291), one time in many.
main(sys.argv[1], sys.argv[2], int(sys.argv[3]), compiled=sys.argv[4:] == ["compiled"])
