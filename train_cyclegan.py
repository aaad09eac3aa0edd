"""Train the unpaired head: a CycleGAN from the distilled model's images (domain A) to the baseline model's (domain B).

    python generate_pairs.py --mini && torchrun train_cyclegan.py --mini         # minutes on a laptop -> runs/mini
    torchrun --nnodes=4 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_cyclegan.py
          # on each of 4 nodes: machine and schedule of the paper's final run, our networks -> runs/cyclegan
    torchrun --nproc_per_node=4 train_cyclegan.py --out runs/one-node            # a quarter of the global batch
    python train_cyclegan.py --distilled my/schnell --baseline my/dev --out runs/own    # two folders that share nothing

The same command again continues a stopped run. The run folder holds last/ (the head, for enhance.py), samples/ to look
at, log.csv, args.json and state/.

Names: A = distilled = x, B = baseline = y; generators G_AB (the paper's G) and G_BA (its F); discriminators D_A and
D_B. The head is the average of G_AB's weights over the last steps.

Paper: arXiv 2505.02255, section 4.2, equations 2 and 3; schedule: section 5.2. CycleGAN: Zhu et al., ICCV 2017. ESA:
see modules.ESA.
"""
import math
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modules import (DetailDiscriminator, PatchDiscriminator, ResnetGenerator, epoch_row, fail, make_printing_safe,
                     normalise, number, parse_training_args, positive, print_once, progress_bar, read_together,
                     run_training, save_epoch, save_head, share, ssim, start_accelerator, start_epoch, start_from,
                     start_run, to_network, to_uint8, training_files, training_loader, training_parser, whole,
                     write_samples)

PAPER_FRACTION = 0.2  # of its close to 140,000 pairs, in the final runs (section 5.2)

# What --mini changes: data, network and schedule, so that two CPU cores get through it in minutes. All ours.
MINI = dict(data=Path("data/mini"), out="runs/mini", size=64, crop=32, fraction=1.0, channels=16, blocks=1,
            lr=5e-4, average=0.995, epochs=30)


def parse_args():
    parser = training_parser(__doc__)
    flag = parser.add_argument
    # Images
    flag("--baseline", type=Path, metavar="DIR", help="instead of --data: the slow model's, of other scenes too (ours)")
    flag("--fraction", type=share, help=f"share of the images to train on (paper: {PAPER_FRACTION} in its final runs, "
         "0.005 to 0.02 in its search; ours: 1 with --distilled and --baseline)")
    flag("--size", type=positive, default=512, help="side in pixels that images are brought to (paper: 512, and 256 in "
         "its search)")
    flag("--crop", type=whole, default=0, help="train on random squares of this side; 0 = whole images (ours: 0)")
    flag("--out", default="runs/cyclegan", help="run folder (ours: %(default)s)")
    # Networks
    flag("--attention", choices=["esa", "none"], default="esa", help="none leaves ESA out (paper's best: esa)")
    flag("--classic", action="store_true", help="generators, discriminators and losses of CycleGAN (2017), with its "
         "ghosts and checkerboards: the form nearest to the paper, which gives no layers (ours: off)")
    flag("--tone", action="store_true", help="for models that differ in tone, too: the discriminators also see "
         "brightness, the head changes light in proportion, and --crop cuts squares of any size up to the whole image, "
         "reduced to its side (ours: off)")
    flag("--channels", type=positive, default=64, help="width of the first layer of all four networks (ours: 64, "
         "as CycleGAN has)")
    flag("--blocks", type=positive, default=9, help="residual blocks (ours: 9, as CycleGAN has)")
    flag("--init", type=Path, metavar="DIR|HUB_ID", help="start from another head's weights; where DIR is a run "
         "folder, from those of all four networks (ours: none)")
    # Schedule
    flag("--epochs", type=positive, default=190, help="passes over the larger set of images (paper: 190, "
         "in its final runs)")
    flag("--lr", type=number, default=1e-4, help="Adam's learning rate (paper: 1e-4; without ESA also 2e-4 "
         "and 3e-4, which were worse); our discriminators learn at four times this rate")
    flag("--lambda-cycle", type=number, default=2, help="weight of the cycle loss (paper's best: 2 of 2, 5, 10)")
    flag("--r1", type=number, default=0.3, help="weight of the discriminators' gradient penalty (ours: 0.3; --classic "
         "has none)")
    flag("--average", type=share, default=0.999, help="decay of the moving average of weights that the head is (ours: "
         "0.999)")
    flag("--batch-size", type=positive, default=4, help="pairs per GPU (ours: 4; the paper does not say)")
    return parse_training_args(parser, MINI, PAPER_FRACTION)


# ------------------------------------------------------------------------------------ the CycleGAN losses
# The networks are in modules.py: ResnetGenerator, DetailDiscriminator; crops and flips: TrainingImages.
def adversarial_loss(D, fake, real, classic):
    """The generator's side of the game: low where D takes its fakes for real. D gives (N, scores) or a map of them."""
    if classic:  # least squares (Mao et al. 2017): fakes should score 1
        return (D(fake) - 1).square().mean()
    # Relativistic (Jolicoeur-Martineau 2018): they should score more than the real images beside them.
    return F.softplus(D(real) - D(fake)).mean()


def generator_loss(x, y, G_AB, G_BA, D_A, D_B, lambda_cycle, classic=False):
    """The paper's equation 3 with the cycle loss of equation 2; x is distilled (A), y is baseline (B).

    Returns (total, GAN part, cycle part, fake A, fake B). The L1 norm, which the paper leaves open, is CycleGAN's.
    There is no identity term: the paper has none, and one held our networks at the identity.
    """
    fake_B, fake_A = G_AB(x), G_BA(y)
    loss_gan = adversarial_loss(D_B, fake_B, y, classic) + adversarial_loss(D_A, fake_A, x, classic)
    loss_cycle = F.l1_loss(G_BA(fake_B), x) + F.l1_loss(G_AB(fake_A), y)  # eq. 2
    loss = loss_gan + lambda_cycle * loss_cycle                           # eq. 3
    return loss, loss_gan, loss_cycle, fake_A, fake_B


def discriminator_loss(D, real, fake, classic=False):
    """The discriminator's side: low where D tells real images from fakes."""
    if classic:
        return 0.5 * ((D(real) - 1).square().mean() + D(fake).square().mean())
    return F.softplus(D(fake) - D(real)).mean()


def gradient_penalty(D, images):
    """Squared length of the gradient of D's scores by the image, mean over the images (Mescheder et al. 2018).

    R1, times the number of pixels over 32 x 32, as the scores are means over the image: one weight serves all sizes. It
    steadies the training: without it, and with a discriminator that sees well, the generators never settle.
    """
    images = images.detach().requires_grad_()
    slope, = torch.autograd.grad(D(images).mean(1).sum(), images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean() * images[0, 0].numel() / 32 ** 2


class ReplayPool:
    """For --classic, 50 earlier fakes (Shrivastava et al. 2017): once it is full, D sees one of them half of the time.

    One for each domain, process and epoch. It keeps 8 bits, a quarter of the memory.
    """

    def __init__(self, size=50):
        self.size, self.images = size, []

    def query(self, fakes):
        """(N, 3, H, W) fakes -> as many images, each the fake itself or one from the pool, which it replaces."""
        answer = []
        for fake in fakes.detach():
            if len(self.images) < self.size:
                self.images.append(to_uint8(fake))
            elif random.random() < 0.5:
                index = random.randrange(self.size)
                older = self.images[index]
                self.images[index] = to_uint8(fake)
                fake = normalise(older)
            answer.append(fake)
        return torch.stack(answer)


def decay(args, epoch):
    """CycleGAN's schedule: factor 1, then over the second half of the epochs linear towards 0. Epochs count from 0."""
    return min(1.0, (args.epochs - epoch) / max(1, args.epochs - args.epochs // 2))


# ---------------------------------------------------------------------------------------------- training
def main(args):
    # Set-up: device and processes, images, four networks, two optimizers
    accelerator, autocast = start_accelerator(args)
    device, out = accelerator.device, Path(args.out)
    files = training_files(args, paired=False)
    loader = training_loader(files, args, accelerator, paired=False)
    samples = list(read_together(zip(files["samples"][:32]), args.size))  # held-out images where --data has some
    samples = torch.cat(samples or fail("none of the sample images can be read"))

    network = dict(channels=args.channels, blocks=args.blocks, attention=args.attention, classic=args.classic,
                   tone=args.tone)
    G_AB, G_BA = ResnetGenerator(**network), ResnetGenerator(**network)  # G and F of the paper
    if args.classic:
        D_A, D_B = PatchDiscriminator(args.channels), PatchDiscriminator(args.channels)
    else:
        # How many sizes the discriminators look at: each half of the one before, the last of 16 pixels or more
        sizes = min(3, 1 + int(math.log2((args.crop or args.size) / 16)))
        D_A, D_B = (DetailDiscriminator(args.channels, sizes, args.tone) for _ in range(2))
    networks = {"G_AB": G_AB, "G_BA": G_BA, "D_A": D_A, "D_B": D_B}
    start_from(args, networks)
    for net in networks.values():
        net.to(device, memory_format=torch.channels_last)
    # The head is the average of G_AB over the last steps: the game goes to and fro, the average does not.
    average = AveragedModel(G_AB, multi_avg_fn=get_ema_multi_avg_fn(args.average))
    if args.compile:  # not the discriminators: torch.compile has no second derivative, which the penalty needs
        G_AB.compile(dynamic=False)
        G_BA.compile(dynamic=False)
    adam = partial(torch.optim.Adam, betas=(0.5, 0.999), fused=True)  # betas of CycleGAN
    optimizer_G = adam([*G_AB.parameters(), *G_BA.parameters()], args.lr)
    # Discriminators that learn faster than the generators (Heusel et al. 2017, who introduced FID) see what is left to do.
    optimizer_D = adam([*D_A.parameters(), *D_B.parameters()], args.lr)
    # The same networks in DDP's wrappers, which share gradients between processes
    ddp_G_AB, ddp_G_BA, ddp_D_A, ddp_D_B = map(accelerator.prepare, (G_AB, G_BA, D_A, D_B))
    # What a continued run needs
    parts = networks | {"average": average, "optimizer_G": optimizer_G, "optimizer_D": optimizer_D}

    # A new run, or the state after the last whole epoch of this one
    print_once(f"{len(files['distilled'])} distilled and {len(files['baseline'])} baseline images to train on")
    if args.classic and len(loader) * args.batch_size <= ReplayPool().size:
        print_once("note: an epoch's images do not fill the replay pool, so the discriminators see new fakes only")
    log = start_run(args, files, accelerator, parts)
    epochs_done = len(log)

    pairs = len(loader) * args.batch_size * accelerator.num_processes
    bar = progress_bar(total=args.epochs * pairs, initial=epochs_done * pairs, unit=" pairs", smoothing=0.1)
    for epoch in range(epochs_done, args.epochs):
        start_epoch(epoch, loader, args, accelerator)
        pool_A, pool_B = ReplayPool(), ReplayPool()  # empty again: no state to save, on however many GPUs it goes on
        lr = args.lr * decay(args, epoch)
        optimizer_G.param_groups[0]["lr"], optimizer_D.param_groups[0]["lr"] = lr, lr if args.classic else 4 * lr
        sums, unreadable, start = Counter(), 0, time.perf_counter()

        for x, y, skipped in loader:
            x, y = to_network(x, device), to_network(y, device)  # distilled, baseline

            # Both generators: fool the discriminators, and come back to the input after a cycle. The discriminators
            # only judge here, without DDP's wrappers, which would wait for gradients that they do not get.
            D_A.requires_grad_(False)
            D_B.requires_grad_(False)
            with autocast():
                loss_G, loss_gan, loss_cycle, fake_A, fake_B = generator_loss(
                    x, y, ddp_G_AB, ddp_G_BA, D_A, D_B, args.lambda_cycle, args.classic)
            accelerator.backward(loss_G)
            optimizer_G.step()
            optimizer_G.zero_grad()
            average.update_parameters(G_AB)

            # Both discriminators: tell real images from fakes. loss_D in log.csv is without the penalty.
            D_A.requires_grad_(True)
            D_B.requires_grad_(True)
            if args.classic:
                fake_A, fake_B = pool_A.query(fake_A), pool_B.query(fake_B)
            loss_D = penalty = 0
            for D, real, fake in ((ddp_D_A, x, fake_A.detach()), (ddp_D_B, y, fake_B.detach())):
                with autocast():
                    loss_D = loss_D + discriminator_loss(D, real, fake, args.classic)
                if not args.classic:  # in 32 bits, as it is a derivative that is derived again
                    penalty = penalty + gradient_penalty(D, real)
            accelerator.backward(loss_D + args.r1 * penalty)
            optimizer_D.step()
            optimizer_D.zero_grad()

            # The losses stay on the device: reading a value would stall it.
            losses = dict(loss_G=loss_G, loss_gan=loss_gan, loss_cycle=loss_cycle, loss_D=loss_D)
            if not args.classic:
                losses["gradient_penalty"] = penalty
            for name, loss in losses.items():
                sums[name] += loss.detach()
            unreadable += int(skipped.sum())
            bar.update(len(x) * accelerator.num_processes)

        # The epoch is over: measure, look, and save.
        row = epoch_row(epoch + 1, sums, unreadable, start, loader, accelerator, args)
        if accelerator.is_main_process:
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # few images do not repay compiling
                outputs = torch.cat([average(image[None].to(device)) for image in samples])
                cycled = torch.cat([G_BA(image[None]) for image in outputs])
            similarity = ssim((samples + 1) / 2, (cycled.cpu() + 1) / 2, data_range=1).mean().item()
            row |= {"cycle_ssim": similarity, "lr": lr}
            bar.write(f"epoch {epoch + 1}/{args.epochs}  generator {row['loss_G']:.3f} (GAN {row['loss_gan']:.3f}, "
                      f"cycle {row['loss_cycle']:.3f})  discriminator {row['loss_D']:.3f}  "
                      f"cycle SSIM {row['cycle_ssim']:.3f}  {row['pairs_per_s']:.1f} pairs/s")
            write_samples(out, epoch + 1, input=samples, output=outputs, cycle=cycled)
            save_head(average.module, out / "last")
        log.append(row)
        # Last, because it commits the epoch: after a crash before it, the same command makes the head again, too.
        save_epoch(out, log, parts, accelerator)
    bar.close()

    if epochs_done >= args.epochs:
        print_once(f"{out} is finished: another --out starts another run, more --epochs continue this one")
    if accelerator.is_main_process:
        similarity = log[-1]["cycle_ssim"]
        below = ' (the paper: "values significantly below 0.9 indicated poor-quality results")' * (similarity < 0.9)
        print(f"{out / 'last'}: epoch {len(log)}, cycle SSIM {similarity:.3f} of {len(samples)} images{below}")


if __name__ == "__main__":
    make_printing_safe()
    run_training(main, parse_args())
