"""Train the paired head: a U-Net with CBAM that turns a distilled image into the baseline image of the same name.

    python generate_pairs.py --mini && torchrun train_unet.py --mini             # minutes on a laptop -> runs/mini-unet
    torchrun --nproc_per_node=4 train_unet.py --fraction 0.01                    # the paper's run
    torchrun ... --resume                                                        # go on where it stopped

loss = GRAD(x, z) + LPIPS(y, z), with x the input, y the target, z the output (paper, section 3.2): the edges of the
input, the look of the target. A tenth of the training pairs is kept for validation, and training stops when the
validation loss has not fallen for --patience epochs. The run folder is laid out like train_cyclegan.py's.
"""
import argparse
import warnings
from pathlib import Path

import torch
from torch.nn.functional import l1_loss

from modules import (UNet, add_training_flags, benchmark, fail, gradient_loss, load_state, memory_format,
                     parse_training_args, positive, progress_bar, read_samples, run_training, save_head, save_state,
                     start_accelerator, start_run, train_epoch, training_files, training_loader, validation_mean,
                     write_log, write_samples)

# What --mini changes: a network, images and an epoch that two CPU cores get through in minutes. All ours.
MINI = dict(data="data/mini", out="runs/mini-unet", size=64, fraction=1.0, channels=16, depth=4, global_skip=True,
            crop=32, lr=1e-3, epochs=12, perceptual="random")


LOSSES = "loss", "loss_structure", "loss_perceptual"  # what a step returns, and log.csv's columns


# ------------------------------------------------------------------------------------------------- the paired losses
def perceptual_loss(name, device):
    """LPIPS (Zhang et al. 2018) as a function of two (N, 3, H, W) batches in [-1, 1] -> (N,) distances.

    "vgg", "alex" and "squeeze" need the trunk that torchvision downloads once. "random" (a VGG trunk), "random-alex"
    and "random-squeeze" need nothing: with seeded random weights and equally weighted layers they still compare
    textures and edges at several scales, but their values cannot be compared with published LPIPS.
    """
    import lpips
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision the old way
        torch.manual_seed(0)
        try:
            if name.startswith("random"):
                trunk = name.removeprefix("random").removeprefix("-") or "vgg"
                network = lpips.LPIPS(net=trunk, lpips=False, pnet_rand=True, verbose=False)
                for layer in network.net.modules():
                    if isinstance(layer, torch.nn.Conv2d):  # He-normal: activations keep their scale through the depth
                        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                        # LPIPS compares directions of features; only biases let those depend on contrast and colour.
                        torch.nn.init.normal_(layer.bias)
            else:
                network = lpips.LPIPS(net=name, verbose=False)
        except OSError as error:  # URLError is one
            fail(f"cannot load LPIPS's {name} trunk ({error}): torchvision downloads it to "
                 f"{torch.hub.get_dir()}/checkpoints (TORCH_HOME moves that); put it there, or use --perceptual random")
    network.requires_grad_(False).eval().to(device, memory_format=memory_format(device))
    return lambda y, z: network(y, z).flatten()


def paired_loss(x, y, z, structure, perceptual):
    """(total, structure part, perceptual part) for input x, target y, output z: equation 1 of the paper."""
    loss_structure = gradient_loss(x, z) if structure == "grad" else l1_loss(x, z)
    loss_perceptual = perceptual(y, z).mean()
    return loss_structure + loss_perceptual, loss_structure, loss_perceptual


# ---------------------------------------------------------------------------------------------------------- training
def main(args):
    accelerator = start_accelerator(args)
    device, out = accelerator.device, Path(args.out)
    files = None if args.benchmark else training_files(args, paired=True)

    net = UNet(args.channels, args.depth, args.upsample, args.global_skip)
    net.to(device, memory_format=memory_format(device))
    if args.compile:
        net.compile(dynamic=False)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, fused=True)
    net, optimizer = accelerator.prepare(net, optimizer)
    head = accelerator.unwrap_model(net)
    perceptual = perceptual_loss(args.perceptual, device)

    def losses(network, x, y):
        with accelerator.autocast():  # the trunk of LPIPS is most of the work
            return paired_loss(x, y, network(x), args.structure, perceptual)

    def train_step(x, y):
        """One step. Returns the losses, still on the device."""
        loss, loss_structure, loss_perceptual = losses(net, x, y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss, loss_structure, loss_perceptual]).detach()

    if args.benchmark:
        return benchmark(train_step, args, accelerator)

    kept = max(1, len(files["distilled"]) // 10)  # a tenth to validate with (ours); the subset is in random order
    validation = list(zip(files["distilled"][:kept], files["baseline"][:kept]))
    files = {**files, "distilled": files["distilled"][kept:], "baseline": files["baseline"][kept:]}
    if not files["distilled"]:
        fail("one pair is not enough: one is kept for validation")
    loader = training_loader(files, args, accelerator, paired=True)
    samples = [read_samples(paths[:8], args.size) for paths in zip(*validation[:8])]
    epochs_done, log = start_run(args, files, accelerator)
    if epochs_done:
        load_state(out, accelerator)
    kind = " (seeded random weights: not LPIPS)" if args.perceptual.startswith("random") else ""
    accelerator.print(f"{len(files['distilled'])} pairs to train on, {kept} to validate with, perceptual loss: "
                      f"{args.perceptual}{kind}")

    bar = progress_bar(loader, args, epochs_done, accelerator)
    for epoch in range(epochs_done, args.epochs):
        if epoch - best_epoch(log) >= args.patience:
            break
        net.train()
        row = train_epoch(epoch, loader, train_step, LOSSES, accelerator, bar, out)
        net.eval()
        row["validation_loss"] = validation_mean(validation, args.size, lambda x, y: losses(head, x, y)[0], accelerator)
        log.append({"epoch": epoch + 1, **row, "lr": args.lr})
        if accelerator.is_main_process:
            bar.write(f"epoch {epoch + 1}/{args.epochs}  loss {row['loss']:.4f} "
                      f"(structure {row['loss_structure']:.4f}, perceptual {row['loss_perceptual']:.4f})  "
                      f"validation {row['validation_loss']:.4f}{' (best)' if best_epoch(log) == epoch + 1 else ''}  "
                      f"{row['images_per_s']:.1f} images/s")
            write_log(out, log)
            with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
                outputs = [head(x[None].to(device)) for x in samples[0]]
            write_samples(out, epoch + 1, input=samples[0], output=outputs, target=samples[1])
            save_head(head, out / "last")
            if best_epoch(log) == epoch + 1:
                save_head(head, out / "best")
        save_state(out, epoch + 1, accelerator)
    bar.close()
    if len(log) < args.epochs:
        accelerator.print(f"stopped early: no better validation loss for {args.patience} epochs")
    best = log[best_epoch(log) - 1]
    accelerator.print(f"{out / 'best'}: epoch {best['epoch']}, validation loss {best['validation_loss']:.4f}")
    accelerator.wait_for_everyone()  # on gloo, a process that leaves before the others aborts now and then
    accelerator.end_training()


def best_epoch(log):
    """The epoch with the lowest validation loss, 0 before the first."""
    return min(log, key=lambda row: row["validation_loss"], default={"epoch": 0})["epoch"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, out="runs/unet", fraction=0.01, epochs=200, lr=5e-5, batch_size=8,
                       epochs_help="passes over the data at most (ours: 200; --patience ends it)")
    flag = parser.add_argument
    flag("--depth", type=positive, default=6, help="levels of the U-Net (paper: 6)")
    flag("--structure", choices=["grad", "l1"], default="grad",
         help="what holds the output to the input (paper: grad; l1 did about as well)")
    flag("--perceptual", choices=["vgg", "alex", "squeeze", "random", "random-alex", "random-squeeze"], default="vgg",
         help="trunk of LPIPS (ours: vgg); random weights (of a VGG) need no download")
    flag("--patience", type=positive, default=10, help="epochs without a better validation loss (paper: 10)")
    run_training(main, parse_training_args(parser, MINI))
