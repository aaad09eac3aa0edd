"""Train the paired head: a U-Net with CBAM that turns a distilled image into the baseline image of the same name.

    python generate_pairs.py --mini && torchrun train_unet.py --mini             # minutes on a laptop -> runs/mini-unet
    torchrun train_unet.py                               # the paper's setting: one GPU, 1 % of the pairs -> runs/unet
    torchrun --nproc_per_node=4 train_unet.py --batch-size 2                     # the same batch on four GPUs

The same command again continues a stopped run. loss = GRAD(x, z) + LPIPS(y, z), with x the input, y the target, z the
output (equation 1): the edges of the input, the look of the target. A tenth of the training pairs is kept for
validation, and training stops when the validation loss has not fallen for --patience epochs. The run folder is laid out
like train_cyclegan.py's; the head to use is best/, the epoch of the lowest validation loss.

Paper: arXiv 2505.02255, section 4.1, equation 1; section 5.1. CBAM: see modules.CBAM.
"""
import argparse
import math
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import l1_loss

from modules import (UNet, epoch_row, fail, first_line, make_printing_safe, number, parse_training_args, positive,
                     print_once, progress_bar, read_together, run_training, save_epoch, save_head, share,
                     start_accelerator, start_epoch, start_from, start_run, to_network, training_files,
                     training_loader, training_parser, whole, write_samples)

PAPER_FRACTION = 0.01  # of its close to 140,000 pairs (section 5.1)

# What --mini changes: data, network and schedule, so that two CPU cores get through it in minutes. All ours.
# structure: the miniature's pairs are aligned, and GRAD, which holds the output to the edges of the *input*, forbids
# the very detail that the head is to bring back. The paper's pairs are not aligned, and need it.
MINI = dict(data=Path("data/mini"), out="runs/mini-unet", size=64, crop=32, fraction=1.0, channels=16, depth=4,
            global_skip=True, structure="none", perceptual="random", lr=1e-3, epochs=12)


def parse_args():
    parser = training_parser(__doc__)
    flag = parser.add_argument
    # Images
    flag("--baseline", type=Path, metavar="DIR", help="instead of --data: the slow model's, with the same names (ours)")
    flag("--fraction", type=share, help=f"share of the images to train on (paper: {PAPER_FRACTION}; "
         "ours: 1 with --distilled and --baseline)")
    flag("--size", type=positive, default=512, help="side in pixels that images are brought to (paper: %(default)s)")
    flag("--crop", type=whole, default=0, help="train on random squares of this side; 0 = whole images (ours: 0)")
    flag("--out", default="runs/unet", help="run folder (ours: %(default)s)")
    # Network and loss
    flag("--attention", choices=["cbam", "none"], default="cbam", help="none leaves CBAM out (paper: cbam)")
    flag("--global-skip", action=argparse.BooleanOptionalAction, default=False,
         help="output = input + residual, starting at the identity (ours: off, on with --mini)")
    flag("--channels", type=positive, default=64, help="width of the first level (ours: 64)")
    flag("--depth", type=positive, default=6, help="levels of the U-Net (paper: six layers)")
    flag("--structure", choices=["grad", "l1", "none"], default="grad", help="what holds the output to the input "
         "(paper: grad, without which images were unsharp; l1, our reading of it, did about as well)")
    flag("--perceptual", choices=["vgg", "random"], default="vgg", help="trunk of LPIPS (ours: vgg); random needs no "
         "download")
    flag("--init", type=Path, metavar="DIR|HUB_ID", help="start from another head's or run's weights (ours: none)")
    # Schedule
    flag("--epochs", type=positive, default=200, help="passes over the data at most (ours: 200; --patience ends it)")
    flag("--patience", type=positive, default=10, help="epochs without a better validation loss (paper: 10)")
    flag("--lr", type=number, default=5e-5, help="Adam's learning rate (paper: 5e-5; Adam is ours)")
    flag("--batch-size", type=positive, default=8, help="pairs per GPU (ours: 8; the paper does not say)")
    return parse_training_args(parser, MINI, PAPER_FRACTION)


# ------------------------------------------------------------------------------------- the paired losses
def perceptual_loss(trunk, device):
    """LPIPS (Zhang et al. 2018) as a function of two (N, 3, H, W) batches in [-1, 1] -> (N,) distances.

    Trunk "vgg" is one that torchvision downloads once. "random" needs nothing: with seeded random weights and equally
    weighted layers it still compares textures and edges at several scales, but its values are not those of LPIPS.
    """
    import lpips
    from torchvision.models import VGG16_Weights
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision the old way
        torch.manual_seed(0)
        file = Path(torch.hub.get_dir(), "checkpoints", Path(VGG16_Weights.IMAGENET1K_V1.url).name)
        try:
            network = lpips.LPIPS(net="vgg", lpips=trunk == "vgg", pnet_rand=trunk == "random", verbose=False)
        except Exception as error:  # no network, an HTML page, a file cut short: each has its own class
            advice = "delete it" if file.exists() else "put it there (TORCH_HOME moves the folder)"
            fail(f"cannot load LPIPS's VGG, which torchvision keeps as {file} and downloads where it is missing "
                 f"({first_line(error)}): {advice}, or use --perceptual random")
        for layer in network.net.modules():
            if trunk == "random" and isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # activations keep their scale
                # LPIPS compares directions of features; only biases let those depend on contrast and colour.
                torch.nn.init.normal_(layer.bias)
    network.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return lambda y, z: network(y, z).flatten()


def gradient_loss(x, z):
    """GRAD of the paper: mean absolute difference between the finite differences of x and z, both (N, 3, H, W).

    The paper gives no formula; this form and the range [-1, 1] are ours.
    """
    difference = z - x
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def paired_loss(x, y, z, structure, perceptual):
    """Equation 1 for input x, target y, output z: {"loss": the sum, "loss_structure", "loss_perceptual"}."""
    loss_structure = {"grad": gradient_loss, "l1": l1_loss, "none": lambda x, z: 0 * z.sum()}[structure](x, z)
    loss_perceptual = perceptual(y, z).mean()
    return {"loss": loss_structure + loss_perceptual, "loss_structure": loss_structure,
            "loss_perceptual": loss_perceptual}


def validation_loss(net, pairs, size, loss, accelerator):
    """Mean loss over (input, target) paths, whole images one at a time, shared out over all processes.

    An unreadable pair is left out. Every process gets the same number.
    """
    total = torch.zeros(2, device=accelerator.device)
    for pair in read_together(pairs[accelerator.process_index::accelerator.num_processes], size):
        x, y = pair.to(accelerator.device).split(1)
        total[0] += loss(x, y, net(x))["loss"]
        total[1] += 1
    total = accelerator.reduce(total)
    mean = (total[0] / total[1]).item()
    if not math.isfinite(mean):
        fail("the validation loss is not finite, or no validation pair can be read")
    return mean


def best_row(log):
    """The epoch with the lowest validation loss."""
    return min(log, key=lambda row: row["validation_loss"])


# ---------------------------------------------------------------------------------------------- training
def main(args):
    # Set-up: device and processes, images, the network and its optimizer, the loss
    accelerator, autocast = start_accelerator(args)
    device, out = accelerator.device, Path(args.out)
    files = training_files(args, paired=True)
    kept = max(1, len(files["distilled"]) // 10)  # a tenth to validate with (ours); the files are in random order
    validation = list(zip(files["distilled"][:kept], files["baseline"][:kept]))
    files |= {domain: files[domain][kept:] for domain in ("distilled", "baseline")}
    if not files["distilled"]:
        fail("one pair is not enough: one is kept for validation")
    loader = training_loader(files, args, accelerator, paired=True)
    samples = list(read_together(validation[:8], args.size)) or fail("none of the pairs to look at can be read")
    inputs, targets = torch.stack(samples).unbind(1)

    net = UNet(args.channels, args.depth, args.attention, global_skip=args.global_skip)
    net.to(device, memory_format=torch.channels_last)
    if args.compile:
        net.compile(dynamic=False)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    ddp_net = accelerator.prepare(net)  # shares gradients between processes; net itself is for all else
    loss_of = partial(paired_loss, structure=args.structure, perceptual=perceptual_loss(args.perceptual, device))
    parts = {"net": net, "optimizer": optimizer}  # what a continued run needs
    start_from(args, {"net": net})

    # A new run, or the state after the last whole epoch of this one
    print_once(f"{len(files['distilled'])} pairs to train on, {kept} to validate with, perceptual loss: "
               f"{args.perceptual}{' (seeded random weights: not LPIPS)' * (args.perceptual == 'random')}")
    log = start_run(args, files, accelerator, parts)
    epochs_done = len(log)
    optimizer.param_groups[0]["lr"] = args.lr  # not what it was

    pairs = len(loader) * args.batch_size * accelerator.num_processes
    bar = progress_bar(total=args.epochs * pairs, initial=epochs_done * pairs, unit=" pairs", smoothing=0.1)
    for epoch in range(epochs_done, args.epochs):
        if log and epoch - best_row(log)["epoch"] >= args.patience:
            break
        start_epoch(epoch, loader, args, accelerator)
        sums, unreadable, start = Counter(), 0, time.perf_counter()

        for x, y, skipped in loader:
            x, y = to_network(x, device), to_network(y, device)  # input, target
            with autocast():  # the trunk of LPIPS is most of the work
                losses = loss_of(x, y, ddp_net(x))
            accelerator.backward(losses["loss"])
            optimizer.step()
            optimizer.zero_grad()

            # The losses stay on the device: reading a value would stall it.
            for name, loss in losses.items():
                sums[name] += loss.detach()
            unreadable += int(skipped.sum())
            bar.update(len(x) * accelerator.num_processes)

        # The epoch is over: measure, look, and save.
        row = epoch_row(epoch + 1, sums, unreadable, start, loader, accelerator, args)
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # few images do not repay compiling
            with autocast():
                row["validation_loss"] = validation_loss(net, validation, args.size, loss_of, accelerator)
            outputs = torch.cat([net(image[None].to(device)) for image in inputs])
        row["lr"] = args.lr
        log.append(row)
        if accelerator.is_main_process:
            best = best_row(log) is row
            bar.write(f"epoch {epoch + 1}/{args.epochs}  loss {row['loss']:.4f} "
                      f"(structure {row['loss_structure']:.4f}, perceptual {row['loss_perceptual']:.4f})  "
                      f"validation {row['validation_loss']:.4f}{' (best)' * best}  {row['pairs_per_s']:.1f} pairs/s")
            write_samples(out, epoch + 1, input=inputs, output=outputs, target=targets)
            save_head(net, out / "last")
            if best:
                save_head(net, out / "best")
        # Last, because it commits the epoch: after a crash before it, the same command makes the heads again, too.
        save_epoch(out, log, parts, accelerator)
    bar.close()

    if len(log) == epochs_done:
        print_once(f"{out} is finished: another --out starts another run, more --epochs or --patience go on with it")
    elif len(log) < args.epochs:
        print_once(f"stopped early: no better validation loss for {args.patience} epochs")
    best = best_row(log)
    print_once(f"{out / 'best'}: epoch {best['epoch']}, validation loss {best['validation_loss']:.4f}")


if __name__ == "__main__":
    make_printing_safe()
    run_training(main, parse_args())
