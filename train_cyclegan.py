"""Train the unpaired head: a CycleGAN from the distilled model's images (domain A) to the baseline model's (domain B).

    python generate_pairs.py --mini && torchrun train_cyclegan.py --mini         # minutes on a laptop -> runs/mini
    torchrun --nproc_per_node=4 train_cyclegan.py --fraction 0.2                 # the paper's final run on one node
    torchrun --nnodes=4 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_cyclegan.py
    python train_cyclegan.py --distilled my/schnell --baseline my/dev            # two folders that share nothing
    torchrun ... --resume                                                        # go on where it stopped

The run folder then holds best/ and last/ (heads for enhance.py), samples/, log.csv, args.json and state/.
Paper: arXiv 2505.02255, section 3.3. CycleGAN: Zhu et al., ICCV 2017. ESA: see modules.ESA.
"""
import argparse
import random
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import l1_loss

from modules import (PatchDiscriminator, ResnetGenerator, add_training_flags, benchmark, best_cyclegan_row, gan_loss,
                     load_state, memory_format, parse_training_args, positive, progress_bar, read_samples, run_training,
                     save_head, save_state, ssim, start_accelerator, start_run, train_epoch, training_files,
                     training_loader, write_log, write_samples)

# What --mini changes: a network, images and an epoch that two CPU cores get through in minutes. All ours.
MINI = dict(data="data/mini", out="runs/mini", size=64, fraction=1.0, channels=16, blocks=3, global_skip=True,
            crop=32, lr=3e-4, lambda_cycle=5, epochs=30)


LOSSES = "loss_G", "loss_gan", "loss_cycle", "loss_D"  # what a step returns, and log.csv's columns


# ------------------------------------------------------------------------------------------------ the CycleGAN losses
def generator_loss(x, y, G, F, D_A, D_B, lambda_cycle):
    """Equations 2 and 3 of the paper, for both generators at once; x is distilled (A), y is baseline (B).

    Returns (total, GAN part, cycle part, fake A, fake B). The paper has no identity term, and neither has this.
    """
    fake_B, fake_A = G(x), F(y)
    loss_gan = gan_loss(D_B(fake_B), real=True) + gan_loss(D_A(fake_A), real=True)  # eq. 2, least squares (ours)
    loss_cycle = l1_loss(F(fake_B), x) + l1_loss(G(fake_A), y)                      # eq. 3
    return loss_gan + lambda_cycle * loss_cycle, loss_gan, loss_cycle, fake_A, fake_B


def discriminator_loss(D, real, fake):
    """How well D tells real images from fakes. One pass over both: no layer of D mixes the images of a batch."""
    scores_real, scores_fake = D(torch.cat([real, fake])).chunk(2)
    return 0.5 * (gan_loss(scores_real, real=True) + gan_loss(scores_fake, real=False))


class ReplayPool:
    """The last fakes (Shrivastava et al. 2017; 50 as in CycleGAN): D sees an older fake half of the time."""

    def __init__(self, size=50):
        self.size, self.images, self.rng = size, [], random.Random()

    def query(self, fakes):
        """(N, 3, H, W) fakes -> as many images, each the fake itself or one from the pool, which it replaces."""
        answer = []
        for fake in fakes.detach():
            if len(self.images) < self.size:
                self.images.append(fake.clone())  # a view would keep its whole batch
            elif self.rng.random() < 0.5:
                place = self.rng.randrange(self.size)
                self.images[place], fake = fake.clone(), self.images[place]
            answer.append(fake)
        return torch.stack(answer)


# ---------------------------------------------------------------------------------------------------------- training
def main(args):
    accelerator = start_accelerator(args)
    device, out = accelerator.device, Path(args.out)
    files = None if args.benchmark else training_files(args, paired=False)

    network = dict(channels=args.channels, blocks=args.blocks, attention=args.attention, upsample=args.upsample,
                   global_skip=args.global_skip)
    G, F = ResnetGenerator(**network), ResnetGenerator(**network)  # G: distilled -> baseline, the head; F: back
    D_A, D_B = PatchDiscriminator(args.channels), PatchDiscriminator(args.channels)
    for net in (G, F, D_A, D_B):
        net.to(device, memory_format=memory_format(device))
        if args.compile:
            net.compile(dynamic=False)  # D sees two batch sizes, and each deserves kernels of its own
    adam = partial(torch.optim.Adam, lr=args.lr, betas=(0.5, 0.999), fused=True)  # betas of CycleGAN
    optimizer_G, optimizer_D = adam([*G.parameters(), *F.parameters()]), adam([*D_A.parameters(), *D_B.parameters()])
    G, F, D_A, D_B, optimizer_G, optimizer_D = accelerator.prepare(G, F, D_A, D_B, optimizer_G, optimizer_D)
    head, inverse = accelerator.unwrap_model(G), accelerator.unwrap_model(F)
    # In the generator step the discriminators only judge: unwrapped, or DDP would wait for gradients they do not get.
    judge_A, judge_B = accelerator.unwrap_model(D_A), accelerator.unwrap_model(D_B)
    pool_A, pool_B = ReplayPool(), ReplayPool()

    def train_step(x, y):
        """One step of both generators, then one of both discriminators. Returns the losses, still on the device."""
        for judge in (judge_A, judge_B):
            judge.requires_grad_(False)
        loss_G, loss_gan, loss_cycle, fake_A, fake_B = generator_loss(x, y, G, F, judge_A, judge_B, args.lambda_cycle)
        accelerator.backward(loss_G)
        optimizer_G.step()
        optimizer_G.zero_grad()

        for judge in (judge_A, judge_B):
            judge.requires_grad_(True)
        loss_D = discriminator_loss(D_A, x, pool_A.query(fake_A)) + discriminator_loss(D_B, y, pool_B.query(fake_B))
        accelerator.backward(loss_D)
        optimizer_D.step()
        optimizer_D.zero_grad()
        return torch.stack([loss_G, loss_gan, loss_cycle, loss_D]).detach()

    if args.benchmark:
        return benchmark(train_step, args, accelerator)

    loader = training_loader(files, args, accelerator, paired=False)
    samples = read_samples(files["samples"][:8], args.size)
    accelerator.print(f"{len(files['distilled'])} distilled and {len(files['baseline'])} baseline images to train on")
    epochs_done, log = start_run(args, files, accelerator)
    if epochs_done:
        pools = load_state(out, accelerator)
        pool_A.images, pool_B.images = list(pools["A"].to(device)), list(pools["B"].to(device))

    bar = progress_bar(loader, args, epochs_done, accelerator)
    for epoch in range(epochs_done, args.epochs):
        lr = learning_rate(args, epoch)
        for optimizer in (optimizer_G, optimizer_D):
            for group in optimizer.param_groups:
                group["lr"] = lr
        for pool in (pool_A, pool_B):  # by epoch, so that a resumed run draws what an undisturbed one does
            pool.rng.seed(f"{args.seed} {epoch} {accelerator.process_index} {pool is pool_A}")
        row = train_epoch(epoch, loader, train_step, LOSSES, accelerator, bar, out)

        if accelerator.is_main_process:
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # 8 images do not repay compiling
                outputs = [head(x[None].to(device)) for x in samples]
                cycled = [inverse(output) for output in outputs]
            row["cycle_ssim"] = ssim(samples, torch.cat(cycled).cpu(), data_range=2).mean().item()
            log.append({"epoch": epoch + 1, **row, "lr": lr})
            bar.write(f"epoch {epoch + 1}/{args.epochs}  generator {row['loss_G']:.3f} (GAN {row['loss_gan']:.3f}, "
                      f"cycle {row['loss_cycle']:.3f})  discriminator {row['loss_D']:.3f}  "
                      f"cycle SSIM {row['cycle_ssim']:.3f}"
                      f"{' (below 0.9)' if row['cycle_ssim'] < 0.9 else ''}  {row['images_per_s']:.1f} images/s")
            write_log(out, log)
            write_samples(out, epoch + 1, input=samples, output=outputs, cycle=cycled)
            save_head(head, out / "last")
            if best_cyclegan_row(log, args.decay_start) is log[-1]:
                save_head(head, out / "best")
        save_state(out, epoch + 1, accelerator, {"A": torch.stack(pool_A.images), "B": torch.stack(pool_B.images)})
    bar.close()
    if accelerator.is_main_process:
        best = best_cyclegan_row(log, args.decay_start)
        print(f"{out / 'best'}: epoch {best['epoch']}, generator loss {best['loss_G']:.3f}, cycle SSIM "
              f"{best['cycle_ssim']:.3f}{' (below 0.9 = broken, says the paper)' if best['cycle_ssim'] < 0.9 else ''}")
    accelerator.wait_for_everyone()  # on gloo, a process that leaves before the others aborts now and then
    accelerator.end_training()


def learning_rate(args, epoch):
    """CycleGAN's schedule: constant, then linear to zero from epoch `decay_start` on. Epochs count from 0."""
    return args.lr * min(1.0, (args.epochs - epoch) / max(1, args.epochs - args.decay_start))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, out="runs/cyclegan", fraction=0.2, epochs=190, lr=1e-4, batch_size=4,
                       epochs_help="passes over the larger folder (paper: 190)")
    flag = parser.add_argument
    flag("--attention", choices=["esa", "none"], default="esa", help="none is a plain CycleGAN (paper's best: esa)")
    flag("--blocks", type=positive, default=9, help="residual blocks (ours: 9, as CycleGAN has)")
    flag("--lambda-cycle", type=float, default=2, help="weight of the cycle loss (paper's best: 2 of 2, 5, 10)")
    flag("--decay-start", type=int, help="epoch from which lr falls linearly to 0 (ours: half of --epochs)")
    args = parse_training_args(parser, MINI)
    if args.decay_start is None:
        args.decay_start = args.epochs // 2
    run_training(main, args)
