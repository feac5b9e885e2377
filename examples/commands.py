"""The command line: every command, its options and their help. What it does is in console.py and other rooms.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
from pathlib import Path

import typer


def build_app() -> "typer.Typer":
    console = fp._room("console")
    app = typer.Typer(name="fastprior", no_args_is_help=True, add_completion=False,
                      pretty_exceptions_enable=False,
                      context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None,
                      help="Tell good parts from bad ones: train on good images, "
                           "score new ones in milliseconds.")

    def version(value: bool):
        if value:
            print(fp.__version__)
            raise typer.Exit()

    @app.callback()
    def root(show: bool = typer.Option(False, "--version", callback=version, is_eager=True,
                                       help="Print the version."),
             debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails.")):
        pass

    device_option = typer.Option("auto", help="cpu, cuda, or auto: a GPU where CuPy and one are there.")
    threads_option = typer.Option(None, "--threads", min=1,
                                  help="CPU threads (default: all, or NUMBA_NUM_THREADS).")

    keep_all_option = typer.Option(False, "--keep-all", help="Also use images unlike the others.")

    check_output = fp._room("folders").check_output

    def preset(tier: str) -> dict:
        if tier not in fp.TIERS:
            raise fp.ShapeError(f"--tier: expected {', '.join(fp.TIERS)}, got {tier!r}")
        return fp.TIERS[tier]

    @app.command()
    def train(good: str = typer.Argument(...,
                                         help="Folder of good images, or one with good/ (ok, normal, "
                                              "train/good) in it."),
              output: Path = typer.Option(..., "-o", "--output", help="Model file to write (.npz)."),
              tier: str = typer.Option("default", help="fast, default or accurate: backbone and size."),
              backbone: str = typer.Option(None, help="lite0, lite1, lite2, timm:tf_efficientnet_..., or a "
                                                      "weight file."),
              size: str = typer.Option(None, help="Pixels that images are resized to, multiples of 32: a "
                                                  "square's side, whose area takes the proportions of the "
                                                  "images, or WIDTHxHEIGHT."),
              cell: int = typer.Option(None,
                                       help="Side of a place, pixels of the resized image: 16, 32, ..."),
              steps: int = typer.Option(fp.Settings.steps, help="DDIM inversion steps."),
              iterations: int = typer.Option(None, min=0,
                                             help="At most this many training steps; 0 needs no torch."),
              minutes: float = typer.Option(None, min=0.01,
                                            help="At most this long in the denoiser's training."),
              variant: str = typer.Option(fp.Settings.variant,
                                          help="whitened, or plain (the paper's, for ablations)."),
              calibration: str = typer.Option(fp.Settings.calibration,
                                              help="cross (uses every image) or holdout (exact)."),
              fpr: float = typer.Option(fp.Settings.fpr, help="False-alarm rate to set the threshold for."),
              seed: int = typer.Option(fp.Settings.seed, help="Seed of everything random."),
              bits: int = typer.Option(None,
                                       help="Of 16-bit images: 8, 10, 12, 14 or 16 (default: found in "
                                            "them)."),
              keep_all: bool = keep_all_option,
              roi: Path = typer.Option(None,
                                       help="Where to look: an image, black elsewhere, or polygons (.json); "
                                            "the model keeps it."),
              tiles: int = typer.Option(fp.Settings.tile, min=0,
                                        help="Cut images into overlapping windows of so many pixels a side: "
                                             "large images, odd shapes; 0: do not."),
              multi: bool = typer.Option(False, "--multi",
                                         help="GOOD holds a folder for each product; one model for all."),
              keep_features: bool = typer.Option(False, "--keep-features",
                                                 help="Also write OUTPUT.features.npz, for `update`."),
              threads: int = threads_option):
        """Train a model on good images.

        Example: fastprior train photos/good -o part.npz

        Example: fastprior train photos/good --roi mask.png -o part.npz

        Example: fastprior train --tiles 448 webs/good -o web.npz

        Example: fastprior train --multi products -o all.npz
        """
        check_output(output)
        if keep_features:
            check_output(console.features_file(output))
        if multi and keep_features:
            raise fp.ShapeError("--keep-features: of one product; leave out --multi")
        if multi and tiles:
            raise fp.ShapeError("--tiles: of one product; leave out --multi")
        chosen = preset(tier)
        own = {k: v for k, v in {"backbone": backbone, "cell": cell}.items() if v is not None}
        own |= {"size": console.size_of(size)} if size else {}
        with contextlib.ExitStack() as opened:
            if keep_features:
                own["features"] = opened.enter_context(console.features_beside(output))
            with console.Bars() as bars:
                made = (fp.fit_many if multi else fp.fit)(
                    good, iterations=iterations, minutes=minutes, progress=bars, threads=threads, steps=steps,
                    variant=variant, calibration=calibration, fpr=fpr, seed=seed, bits=bits,
                    keep_all=keep_all, roi=roi, tile=tiles, **chosen | own)
            made.save(output)
        console.tell_training(made)
        print(output)
        if any(p.summary.get("interrupted") for p in fp._products(made).values()):
            raise KeyboardInterrupt  # of the denoiser's training: the model is whole, and whoever waits knows

    @app.command()
    def update(good: str = typer.Argument(..., help="Folder of more good images."),
               model: Path = typer.Option(..., "-m", "--model", help="Model file to start from; its features "
                                                                     "(--keep-features) lie beside it."),
               output: Path = typer.Option(..., "-o", "--output", help="Model file to write (.npz), and its "
                                                                       "features beside it."),
               iterations: int = typer.Option(0, min=0, help="Train the denoiser again, at most this long; 0 "
                                                             "keeps the model's."),
               keep_all: bool = keep_all_option, threads: int = threads_option):
        """Add good images to a model without those it was trained on.

        Gaussians, factors and thresholds become those of a training on all images, old and new. The denoiser
        stays, while it helps; what it still gains is printed, and when to train it again.

        Example: fastprior train photos/good -o part.npz --keep-features

        Example: fastprior update -m part.npz photos/more_good -o new.npz
        """
        check_output(output)
        console.update(good, model, output, iterations, keep_all, threads)

    @app.command()
    def score(paths: list[str] = typer.Argument(..., help="Files, folders or globs."),
              model: Path = typer.Option(None, "-m", "--model",
                                         help="Model file; default: the demo's (washers)."),
              steps: int = typer.Option(None, help="DDIM inversion steps (default: the model's)."),
              fpr: float = typer.Option(None, help="False-alarm rate to judge at (default: the model's)."),
              threshold: float = typer.Option(None, help="A score to judge at instead."),
              map_folder: Path = typer.Option(None, "--map",
                                              help="Folder for heat maps over the images, regions framed."),
              mask_folder: Path = typer.Option(None, "--mask",
                                               help="Folder for masks (PNG, 255 inside a region)."),
              report: Path = typer.Option(None, help="Web page to write: images, maps, threshold to move."),
              as_json: bool = typer.Option(False, "--json", help="One JSON object a line, with regions."),
              device: str = device_option, threads: int = threads_option):
        """Score images: path, score, p-value, verdict. Exit code 0: all good, 1: anomalies, 2: errors.

        The score counts deviations above the median held-out good image; the p-value is the
        share of held-out good images that score as high. Regions are where the map is above its own
        threshold, set for the same false-alarm rate.

        Example: fastprior score examples/washers --map maps/

        Example: fastprior score -m part.npz --fpr 0.05 --json 'photos/*.png'

        Example: fastprior score -m part.npz photos/new --report report.html
        """
        raise typer.Exit(console.score(paths, model, map_folder, mask_folder, as_json, report, steps=steps,
                                       threads=threads, fpr=fpr, threshold=threshold, device=device))

    @app.command()
    def watch(source: str = typer.Argument(None, help="Folder that a camera writes into, or a video file."),
              camera: int = typer.Option(None, help="Number of a camera, in place of SOURCE."),
              model: Path = typer.Option(..., "-m", "--model", help="Model file."),
              as_json: bool = typer.Option(False, "--json", help="One JSON object a line, with regions."),
              keep: Path = typer.Option(None, help="Folder for anomalies and their maps."),
              log: Path = typer.Option(None, help="File of JSON lines; at 10 MB it becomes LOG.1."),
              journal: Path = typer.Option(None, help="Remembers a folder's scored images (default: a file "
                                                      "in ~/.local/state/fastprior)."),
              every: float = typer.Option(.5, min=.01, help="Seconds between two looks at a folder."),
              threshold: float = typer.Option(None, help="A score to judge at (default: the model's)."),
              device: str = device_option, threads: int = threads_option):
        """Score images as they come: from a folder, a camera or a video. Rows as `score` prints them.

        A folder: whole images only, each once, also after a restart; none is dropped. A camera drops the
        frames that come while one is scored, and counts them. Ctrl-C or SIGTERM finishes the image in hand:
        exit code 130, no row lost. A video's end: 0 all good, 1 anomalies, 2 errors. Cameras and videos
        need OpenCV: pip install 'fastprior[camera]'.

        Example: fastprior watch incoming -m part.npz --keep ng --log results.jsonl

        Example: fastprior watch --camera 0 -m part.npz --json
        """
        raise typer.Exit(fp._room("watch").watch(source, camera, model, as_json, keep, log, journal, every,
                                              threshold=threshold, device=device, threads=threads))

    @app.command()
    def calibrate(good: str = typer.Argument(..., help="Folder of new good images, not those of training."),
                  model: Path = typer.Option(..., "-m", "--model", help="Model file to start from."),
                  output: Path = typer.Option(..., "-o", "--output",
                                              help="Model file to write (may be the same)."),
                  known_bad: str = typer.Option(None, "--known-bad",
                                                help="Folder of bad images: shows both errors."),
                  fpr: float = typer.Option(None,
                                            help="False-alarm rate to set the threshold for (default: the "
                                                 "model's)."),
                  threshold: float = typer.Option(None, help="A fixed threshold instead."),
                  keep_all: bool = keep_all_option,
                  device: str = device_option, threads: int = threads_option):
        """Read zero, unit and threshold of the score anew from good images; nothing is trained.

        When lamp, lens or line has changed a little. With --known-bad it prints, for several thresholds,
        the false alarms that the good images promise and the bad images missed, and proposes one.

        Example: fastprior calibrate -m part.npz photos/good_today -o today.npz --known-bad photos/bad
        """
        check_output(output)
        console.calibrate(good, model, output, known_bad, fpr, threshold, keep_all, device, threads)

    @app.command()
    def export(output: Path = typer.Argument(..., help="File to write (.onnx)."),
               model: Path = typer.Option(..., "-m", "--model", help="Model file to export."),
               product: str = typer.Option(None, help="Which one, of a model of several."),
               steps: int = typer.Option(None, help="DDIM inversion steps (default: the model's)."),
               fpr: float = typer.Option(None, help="False-alarm rate to judge at (default: the model's).")):
        """Write a model as one ONNX graph (opset 17): pixels in, score and map out.

        Pixels are uint8, N x H x W x 3, RGB, of any size: the graph resizes them, as fastprior does.
        Threshold, verdict rule, promise and what to feed are in the file's metadata.

        Example: fastprior export -m part.npz part.onnx
        """
        fp._room("export").export(model, output, product, steps=steps, fpr=fpr)

    @app.command()
    def bench(steps: str = typer.Option("2", help="DDIM inversion steps, several with commas: 1,2,3,5,10."),
              model: Path = typer.Option(None, "-m", "--model",
                                         help="Time this model instead of untrained ones."),
              tier: str = typer.Option("default", help="fast, default or accurate: backbone and size."),
              backbone: list[str] = typer.Option([], help="May be given several times."),
              size: str = typer.Option(None, help="Pixels that images are resized to, see `train`."),
              cell: int = typer.Option(fp.Settings.cell, help="Side of a place; 0: 32 from 384 x 384 on."),
              input_size: str = typer.Option(None, help="Pixels of the image that is timed: a side, or "
                                                        "WIDTHxHEIGHT (default: --size)."),
              batch: int = typer.Option(16, min=1, help="Batch whose throughput is measured."),
              against: str = typer.Option("", help="Also the bare backbone in onnxruntime, openvino, "
                                          "openvino-bf16, openvino-int8, torch."),
              processes: bool = typer.Option(False, "--processes", help="Also whole processes, and frames "
                                                                        "beside other work."),
              data: list[Path] = typer.Option([], help="Also accuracy: a data set, or a category of one."),
              variants: str = typer.Option("full", help="--data: of gaussian, joint, full, unshared, plain."),
              seeds: str = typer.Option("0", help="--data: each trains its own models."),
              images: str = typer.Option("", help="--data: numbers of good images to train on."),
              iterations: int = typer.Option(None, min=1, help="--data: at most this many training steps."),
              calibration: str = typer.Option(fp.Settings.calibration, help="--data: cross or holdout."),
              multi: bool = typer.Option(False, "--multi", help="--data: also one model for all categories."),
              report: Path = typer.Option(None, help="--data: folder for a table and a picture."),
              precision: str = typer.Option("float32", help="float32, or float16 on a GPU."),
              as_json: bool = typer.Option(False, "--json", help="One JSON object a row."),
              device: str = typer.Option("cpu", help="cpu or cuda."), threads: int = threads_option):
        """Measure speed on this machine and, with --data, accuracy. Trained models are cached.

        Data sets as MVTec AD, MVTec LOCO, BTAD, VisA or folders (good/ beside others) lay them out.

        Example: fastprior bench --steps 2

        Example: fastprior bench --data mvtec --variants gaussian,joint,full --steps 2,3,5 --report results
        """
        chosen = preset(tier)
        with console.Bars() as bars:
            fp._room("benchmark").bench(
                bars, steps=console.numbers(steps, "steps"), model=model,
                backbones=backbone or [chosen["backbone"]],
                size=console.size_of(size) if size else chosen["size"], cell=cell, precision=precision,
                input_size=input_size and console.size_of(input_size, "input-size"), batch=batch,
                against=against.split(",") if against else [],
                processes=processes, data=data, variants=variants.split(","),
                seeds=console.numbers(seeds, "seeds"), iterations=iterations, multi=multi,
                images=console.numbers(images, "images") if images else [],
                report=report, as_json=as_json, device=device, threads=threads, calibration=calibration)

    @app.command()
    def info(model: Path = typer.Argument(None, help="Model file; without one, this installation."),
             as_json: bool = typer.Option(False, "--json", help="As one JSON object.")):
        """What is installed and in use, and what a model holds.

        Example: fastprior info part.npz
        """
        console.info(model, as_json)

    return app
