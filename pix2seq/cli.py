"""The `pix2seq` command. Bad input ends with one line on stderr and exit code 2, a bug with 1."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pix2seq.errors import InputError, InputErrorElsewhere, Stopped, unknown_name
from pix2seq.tasks import DEFAULT_TASK, task_names

LABEL_FORMATS = ("coco", "labelstudio", "cvat", "yolo")  # of pix2seq.data.formats.predictions
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")

T = TypeVar("T")

EXPORT_DTYPES = {"checkpoint": ("float32", "float16", "bfloat16"), "onnx": ("float32", "int8")}  # by format


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; the entry of the console script."""
    _spin_briefly()
    return run_guarded(_main, sys.argv[1:] if argv is None else argv)


def _number(convert: Callable[[str], T], fits: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """Return a reader of an option's number, which refuses what is none or does not fit."""

    def read(text: str) -> T:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return read


_share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_seed = _number(int, lambda value: 0 <= value < 2**64, "a whole number from 0 to 2**64 - 1")
_port = _number(int, lambda value: 0 <= value < 2**16, "a port from 0 to 65535")
_positive = _number(int, lambda value: value >= 1, "a whole number of at least 1")


def run_guarded(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command; an `InputError` becomes one line and exit code 2."""
    try:
        return command(argv) or 0
    except InputErrorElsewhere:
        return 2
    except InputError as error:
        whose = f" (rank {_rank()})" if _rank() else ""
        print(f"error{whose}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if _rank() == 0:
            print(stop, file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone, as after `head`; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _rank() -> int:
    """Return the rank of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _spin_briefly() -> None:
    """Let threads that wait for others give up their core soon, unless the user chose how they wait.

    Read when torch is imported. By default threads spin for milliseconds, which on a machine with other busy processes
    takes the core from the thread that they wait for. On idle cores, 5000 turns (some 30 us) are as fast.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, without the usage, and suggests near names."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.set_defaults(parser=self)  # the innermost one stays: that of the command that was given

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`, which would complain of what is missing before it named a misspelt option."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            for word in words[: words.index("--") if "--" in words else None]:
                self._check_option(word.partition("=")[0])
        return super().parse_known_args(words, namespace)

    def _check_option(self, name: str) -> None:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        if name.startswith("--") and not any(option.startswith(name) for option in known):
            raise unknown_name(f"option of {self.prog}:", name, known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).lower()
            raise unknown_name(kind, str(value), map(str, action.choices))


class _Version(argparse.Action):
    """Print the version of the installed package; it is looked up only then."""

    def __call__(self, *_: Any) -> None:
        """See `argparse.Action`."""
        from importlib.metadata import version

        print(f"pix2seq {version('pix2seq')}")
        raise SystemExit(0)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    parser = _Parser(
        prog="pix2seq",
        description="Detection, segmentation, keypoints and captions as one language of tokens.",
        epilog="`pix2seq COMMAND --help` shows the options of a command, with examples.\n"
        "Wrong input ends with one line and exit code 2, a bug with 1.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    add_train(commands.add_parser("train", help="train a model on a COCO, Pascal VOC or YOLO folder"))
    add_eval(commands.add_parser("eval", help="metrics of a checkpoint on a data set"))
    add_calibrate(commands.add_parser("calibrate", help="make scores probabilities, and choose what is worth showing"))
    add_predict(commands.add_parser("predict", help="run tasks on images; writes JSON and a drawing for each"))
    add_index(commands.add_parser("index", help="embed the images of a folder, to be searched"))
    add_search(commands.add_parser("search", help="find the images of an index that a sentence is true of"))
    add_convert(commands.add_parser("convert", help="an official TensorFlow checkpoint to this project's format"))
    add_export(commands.add_parser("export", help="write a trained model for others: weights and a card, or ONNX"))
    data = commands.add_parser("data", help="make or check a data set")
    _add_examples(data, "data shapes shapes --train 2000 --val 200", "data check MY_DATA")
    data_commands = data.add_subparsers(dest="data_command", metavar="COMMAND", parser_class=_Parser)
    add_shapes(data_commands.add_parser("shapes", help="write a generated data set in COCO layout"))
    add_things(data_commands.add_parser("things", help="write scenes composed from your cut-outs, in COCO layout"))
    add_check(data_commands.add_parser("check", help="read a data set once and report every defect"))
    add_shard(data_commands.add_parser("shard", help="write a data set as tar files, to be read from disk or http"))
    add_answers(data_commands.add_parser("answers", help="write what a model answers, to learn from its mistakes"))
    add_features(data_commands.add_parser("features", help="encode every image once, to train without the encoder"))
    captions = data_commands.add_parser("captions", help="write captions by a model, or keep those that it finds true")
    _add_examples(captions, "data captions filter MY_DATA --checkpoint runs/mine --out filtered")
    captions_commands = captions.add_subparsers(dest="captions_command", metavar="COMMAND", parser_class=_Parser)
    add_filter_captions(captions_commands.add_parser("filter", help="keep the captions that match their image"))
    add_write_captions(captions_commands.add_parser("write", help="add captions that a model writes"))
    add_sequences(data_commands.add_parser("sequences", help="print and draw what a model learns from one image"))
    add_demo(commands.add_parser("demo", help="show the trained model on new images, or train one"))
    add_serve(commands.add_parser("serve", help="show a trained model on a web page, and answer over HTTP"))
    add_completion(commands.add_parser("completion", help="print a script that completes commands in a shell"))
    return parser


def _main(argv: Sequence[str]) -> int:
    parser = make_parser()
    # argparse takes positional words from one position only; people put key=value before and after options.
    args, others = parser.parse_known_args(argv)
    if others and getattr(args, "sentence", "") is None and not others[0].startswith("-"):
        args.sentence = others.pop(0)
    if others and not (hasattr(args, "settings") and all("=" in word and word[0] != "-" for word in others)):
        args.parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        args.settings = [*args.settings, *others]
    if not hasattr(args, "run"):  # a command that has commands of its own
        args.parser.print_help()
        return 0
    return args.run(args) or 0


def _add_examples(parser: argparse.ArgumentParser, *commands: str) -> None:
    """Let the help of a command end with examples."""
    lines = "\n".join(f"  pix2seq {command}" for command in commands)
    parser.epilog = "\n\n".join(part for part in (parser.epilog, f"examples:\n{lines}") if part)


def parse_tasks(text: str) -> tuple[str, ...]:
    """Split `a,b` into task names. Raises `InputError` for an unknown one."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in task_names():
            raise unknown_name("task", name, task_names())
    if not names:
        raise InputError(f"no task was named; expected some of {', '.join(task_names())}")
    return tuple(dict.fromkeys(names))


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the options of training."""
    _add_examples(
        parser,
        "train --task detection --config configs/detection_voc.yaml data=MY_DATA out=runs/mine",
        "train --task detection data=MY_DATA out=runs/mine steps=20000 lr=3e-4 --resume auto",
    )
    help_task = f"tasks to train, separated by commas: {', '.join(task_names())}; by default those of --config"
    parser.add_argument("--task", help=help_task)
    parser.add_argument("--config", help="YAML file of settings, see configs/")
    parser.add_argument(
        "--objective",
        choices=("likelihood", "reward"),
        help="reward: tune a trained model, init=CHECKPOINT, on its answers",
    )
    parser.add_argument("--resume", default="never", help="never, auto (newest checkpoint of the run) or a checkpoint")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with other settings, such as lr, than the run started with"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that go over the file's")

    def run(args: argparse.Namespace) -> None:
        fixed: dict[str, Any] = {"tasks": list(parse_tasks(args.task))} if args.task is not None else {}
        if args.objective is not None:
            fixed["objective"] = args.objective
        from pix2seq.training.config import load_config
        from pix2seq.training.loop import run as train

        config = load_config(args.config, args.settings, **fixed)
        checkpoint = train(config, resume=args.resume, accept_changes=args.accept_changes)
        if _rank() == 0:
            print(f"checkpoint: {checkpoint}")

    parser.set_defaults(run=run)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Add the options of evaluation."""
    _add_examples(parser, "eval --checkpoint runs/mine --data MY_DATA --split val --out metrics.json")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder")
    parser.add_argument("--data", required=True, type=Path, help="COCO, Pascal VOC or YOLO folder")
    _add_task(parser)
    parser.add_argument("--split", default="val")
    _add_annotations(parser)
    parser.add_argument("--out", type=Path, help="JSON file for the metrics")
    parser.add_argument("--html", type=Path, help="report with tables, curves and the worst images, in one HTML file")
    parser.add_argument("--charts", type=Path, help="folder for the report's charts, as SVG files")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--limit", type=_positive, default=0, help="only the first N images")
    _add_overwrite(parser)
    _add_asking(parser)
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        tasks = parse_tasks(args.task) if args.task else None
        from pix2seq.data.dataset import open_dataset
        from pix2seq.evaluation import check_output, evaluate
        from pix2seq.predictor import Predictor
        from pix2seq.report import Report, check_report, write_charts

        if args.out:
            check_output(args.out, inputs=[args.data, args.checkpoint], overwrite=args.overwrite)
        if args.html:
            check_report(args.html, overwrite=args.overwrite)
        predictor = Predictor.from_pretrained(args.checkpoint, device=args.device, bf16=args.bf16)
        predictor.configure(**_settings(args))
        dataset = open_dataset(args.data, args.split, annotations=args.annotations)
        report = Report(predictor, args.checkpoint, args.data, args.split, args.seed) if args.html else None
        result = evaluate(
            predictor,
            dataset,
            tasks,
            batch_size=args.batch_size,
            limit=args.limit,
            seed=args.seed,
            progress=True,
            observe=report,
        )
        print(result.text())
        print(result.summary())
        if args.out:
            result.save(args.out)
        if report is not None:
            report.save(args.html, result)
        if args.charts:
            write_charts(args.charts, result)

    parser.set_defaults(run=run)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Add the options of calibration."""
    _add_examples(parser, "calibrate --checkpoint runs/mine --data MY_DATA --precision 0.9")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder")
    parser.add_argument("--data", required=True, type=Path, help="COCO, Pascal VOC or YOLO folder, not trained on")
    parser.add_argument("--split", default="val")
    _add_annotations(parser)
    parser.add_argument("--out", type=Path, help="folder for a calibrated copy; by default the checkpoint is changed")
    parser.add_argument(
        "--precision", type=_share, help="least precision of what is shown by default; else its F1 is the best"
    )
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--limit", type=_positive, default=0, help="only the first N images")
    parser.add_argument("--seed", type=_seed, default=0, help="of sampling, 0 to 2**64 - 1")
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        from pix2seq.calibrate import calibrate, write_calibration
        from pix2seq.data.dataset import open_dataset
        from pix2seq.files import output_folder
        from pix2seq.model.pretrained import find_checkpoint
        from pix2seq.predictor import Predictor

        checkpoint = find_checkpoint(args.checkpoint)
        output_folder(args.out or checkpoint)
        predictor = Predictor.from_pretrained(checkpoint, device=args.device, bf16=args.bf16)
        predictor.calibration = {}
        found = calibrate(
            predictor,
            open_dataset(args.data, args.split, annotations=args.annotations),
            precision=args.precision,
            limit=args.limit,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=True,
        )
        for each in found:
            print(each.text())
            if not each.is_precise:
                print(
                    f"warning: no score gives {each.name} a precision of {args.precision}; its threshold is the one of "
                    "the best F1",
                    file=sys.stderr,
                )
        print(f"checkpoint: {write_calibration(checkpoint, found, args.out)}")

    parser.set_defaults(run=run)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the options of prediction."""
    _add_examples(
        parser,
        "predict street.jpg --checkpoint runs/mine --out predictions",
        "predict photos/ 'more/*.png' --checkpoint runs/mine --task detection --format cvat",
        "predict clip.mp4 --checkpoint runs/mine --stride 5",
        "predict street.jpg --checkpoint runs/mine --find 'red car' --find 'people in blue'",
        "predict shelf.jpg --checkpoint runs/mine --like other.jpg:40,20,180,310",
    )
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image or video, folder of them, or pattern such as 'a/*.jpg'",
    )
    parser.add_argument("--image", action="append", type=Path, default=[], help="another way to name an image")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder")
    _add_task(parser)
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for NAME.json and NAME.png")
    parser.add_argument("--boxes", type=Path, help="NAME.json, or a folder of them, whose objects are asked about")
    parser.add_argument(
        "--about",
        metavar="TEXT",
        help="what to ask about, such as '40,20,180,310 person'; a task that cannot read it says what it expects",
    )
    parser.add_argument("--points", nargs="+", metavar="X,Y[,+|-]", help="clicks on an object, another form of --about")
    parser.add_argument(
        "--find", action="append", default=[], metavar="WORDS", help="objects to find, as 'striped star'; repeatable"
    )
    parser.add_argument(
        "--like",
        action="append",
        default=[],
        metavar="IMAGE:X0,Y0,X1,Y1",
        help="find all objects like the one in a box, or a polygon X,Y,X,Y,..., of another image; repeat it for more",
    )
    parser.add_argument(
        "--min-score",
        type=_share,
        help="least score of boxes in drawings and --format, by default as calibrated, else 0.3; JSON has all boxes. "
        "Of what is found by words or examples, JSON has those of this score too, by default of the checkpoint's",
    )
    parser.add_argument("--format", choices=LABEL_FORMATS, help="also write files that a labelling tool imports")
    parser.add_argument("--stride", type=_positive, default=1, help="of videos: ask about every N-th frame")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--resume", action="store_true", help="leave out images that an earlier run has done")
    _add_overwrite(parser)
    _add_asking(parser)
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        tasks = parse_tasks(args.task) if args.task else None
        if args.points and args.about is not None:
            raise InputError("--points is a form of --about; give one of them")
        if args.like and (args.points or args.about is not None):
            raise InputError("--like is a form of --about; give one of them")
        about = ";".join(args.points) if args.points else args.about
        from pix2seq.infer.predict import predict_files

        predict_files(
            [*args.images, *args.image],
            checkpoint=args.checkpoint,
            tasks=tasks,
            boxes=args.boxes,
            out=args.out,
            about=about,
            find=args.find,
            like=args.like,
            settings=_settings(args),
            min_score=args.min_score,
            batch_size=args.batch_size,
            seed=args.seed,
            device=args.device,
            bf16=args.bf16,
            resume=args.resume,
            overwrite=args.overwrite,
            stride=args.stride,
            label_format=args.format,
        )

    parser.set_defaults(run=run)


def add_index(parser: argparse.ArgumentParser) -> None:
    """Add the options of indexing a folder."""
    _add_examples(parser, "index photos --checkpoint runs/mine --out photos-index")
    parser.add_argument("folder", type=Path, help="its images, and those of the folders below it, are embedded")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder with an embedding")
    parser.add_argument("--out", required=True, type=Path, help="folder of the index, new or to be updated")
    parser.add_argument("--batch-size", type=_positive, default=16)
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        from pix2seq.model.hub import local_folder
        from pix2seq.model.pretrained import find_checkpoint, fingerprint
        from pix2seq.predictor import Predictor
        from pix2seq.search import open_index, update_index

        checkpoint = find_checkpoint(local_folder(args.checkpoint)).resolve()
        index = open_index(args.out, args.folder, checkpoint=checkpoint, model=fingerprint(checkpoint))
        predictor = Predictor.from_pretrained(checkpoint, device=args.device, bf16=args.bf16)
        update = update_index(predictor, index, batch_size=args.batch_size, progress=True)
        for error in update.unreadable.values():
            print(f"warning: left out: {error}", file=sys.stderr)
        print(f"index: {args.out}, {update.text()}")

    parser.set_defaults(run=run)


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add the options of searching an index."""
    _add_examples(
        parser,
        "search photos-index 'a red star left of a person' --out found",
        "search photos-index --image street.jpg --top 8",
    )
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder that pix2seq index wrote")
    parser.add_argument("sentence", nargs="?", help="what is true of the images to find")
    parser.add_argument("--image", type=Path, help="find images like this one instead")
    parser.add_argument("--checkpoint", type=Path, help="by default where it was when the index was written")
    parser.add_argument("--out", type=Path, default=Path("search"), help="folder for results.json and results.png")
    parser.add_argument("--top", type=_positive, default=20, help="images to show")
    parser.add_argument(
        "--candidates", type=_positive, default=100, help="images that the embedding finds, for matching to order"
    )
    parser.add_argument("--no-matching", action="store_true", help="order by the embedding alone, which is quicker")
    _add_overwrite(parser)
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        from pix2seq.data.image_index import ImageIndex
        from pix2seq.model.hub import local_folder
        from pix2seq.model.pretrained import find_checkpoint, fingerprint
        from pix2seq.predictor import Predictor
        from pix2seq.search import check_results, search, write_results

        index = ImageIndex(args.index)
        check_results(args.out, overwrite=args.overwrite)
        checkpoint = find_checkpoint(local_folder(args.checkpoint or index.checkpoint))
        index.check_model(fingerprint(checkpoint))
        predictor = Predictor.from_pretrained(checkpoint, device=args.device, bf16=args.bf16)
        options = {"top": args.top, "num_candidates": args.candidates, "match": not args.no_matching}
        hits = search(predictor, index, sentence=args.sentence, image=args.image, **options)
        query = {"sentence": args.sentence} if args.image is None else {"image": str(args.image)}
        write_results(args.out, query, index, hits)
        for number, hit in enumerate(hits, start=1):
            print(f"{number:>3}  {hit.text()}  {hit.name}")

    parser.set_defaults(run=run)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add the options of conversion."""
    from pix2seq.convert.presets import preset_table

    parser.epilog = f"published checkpoints (copy one with gsutil cp -r):\n\n{preset_table()}"
    _add_examples(parser, "convert vit_b_640x640 --config vit-b-640-coco --out checkpoints/vit-b")
    parser.add_argument("prefix", type=Path, metavar="CKPT_PREFIX", help="PREFIX of PREFIX.index, or its folder")
    parser.add_argument("--config", required=True, help="a preset below, or the official config as JSON")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--text-model", type=Path, help="sentencepiece model, for checkpoints that write captions")

    def run(args: argparse.Namespace) -> None:
        from pix2seq.convert.checkpoint import convert_checkpoint

        convert_checkpoint(args.prefix, args.config, args.out, text_model=args.text_model)
        print(f"checkpoint: {args.out}")

    parser.set_defaults(run=run)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of exporting a trained model."""
    _add_examples(
        parser,
        "export runs/mine --out shared/mine --dtype float16 --licence Apache-2.0",
        "export runs/mine --out shared/mine --push me/my-detector",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--format", choices=tuple(EXPORT_DTYPES), default="checkpoint", help="onnx: for pix2seq.runtime"
    )
    dtypes = "; ".join(f"{name}: {', '.join(dtypes)}" for name, dtypes in EXPORT_DTYPES.items())
    parser.add_argument("--dtype", default="float32", help=f"of the weights; {dtypes}")
    parser.add_argument("--data", type=Path, help="folder that it was trained on, for the card; by default as trained")
    parser.add_argument("--metrics", type=Path, help="metrics.json, for the card; needs --eval-data")
    parser.add_argument("--eval-data", type=Path, help="folder that the metrics were measured on")
    parser.add_argument("--eval-split", default="val")
    parser.add_argument("--licence", help="licence of the weights, for the card")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="with --push: only you can see it")

    def run(args: argparse.Namespace) -> None:
        if (args.metrics is None) != (args.eval_data is None):
            raise InputError("--metrics and --eval-data belong together: the card says what a number was measured on")
        if args.dtype not in EXPORT_DTYPES[args.format]:
            raise unknown_name(f"dtype of --format {args.format}:", args.dtype, EXPORT_DTYPES[args.format])
        if args.format == "onnx":
            if any(value is not None for value in (args.data, args.metrics, args.licence)):
                raise InputError("--data, --metrics and --licence are for a card, which only --format checkpoint has")
            from pix2seq.onnx_export import export_onnx

            export_onnx(args.source, args.out, dtype=args.dtype)
            print(f"onnx: {args.out}; run it with python -m pix2seq.runtime {args.out} IMAGE")
            return
        from pix2seq.export import Scored, describe_data, export_model

        scored = None
        if args.metrics is not None:
            scored = Scored.read(args.metrics, describe_data(args.eval_data, args.eval_split))
        export_model(args.source, args.out, dtype=args.dtype, data=args.data, scored=scored, licence=args.licence)
        print(f"checkpoint: {args.out}")
        if args.push is not None:
            from pix2seq.model.hub import push_to_hub

            print(f"uploaded: {push_to_hub(args.out, args.push, private=args.private)}")

    parser.set_defaults(run=run)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Add the options of the generated data set."""
    _add_examples(parser, "data shapes shapes --train 2000 --val 200 --size 96")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--val", type=int, default=500, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-objects", type=int, default=8, help="figures in an image at most, 1 to 8")
    parser.add_argument("--easy", action="store_true", help="five classes, larger and plain, on plain ground")
    parser.add_argument("--person-share", type=float, help="share of figures that are persons; by default 1 of 11")
    parser.add_argument("--classes", help="only these classes, separated by commas; by default all eleven")
    parser.add_argument("--stuff", action="store_true", help="sky and ground behind the figures, annotated as stuff")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1)

    def run(args: argparse.Namespace) -> None:
        from pix2seq.data.shapes import write_shapes

        write_shapes(
            args.folder,
            num_train=args.train,
            num_val=args.val,
            size=args.size,
            seed=args.seed,
            max_objects=args.max_objects,
            easy=args.easy,
            person_share=args.person_share,
            classes=None if args.classes is None else [name.strip() for name in args.classes.split(",")],
            stuff=args.stuff,
            workers=args.workers,
        )
        print(f"{args.train} training and {args.val} validation images in {args.folder}")

    parser.set_defaults(run=run)


def add_things(parser: argparse.ArgumentParser) -> None:
    """Add the options of scenes of cut-outs."""
    _add_examples(parser, "data things scenes --cutouts MY_CUTOUTS --train 8000 --val 200 --unseen 0.3")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--cutouts", required=True, type=Path, help="folder of images with an alpha channel, as red-car_01.png"
    )
    parser.add_argument("--backgrounds", type=Path, help="folder of images to paste onto; by default generated ones")
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--val", type=int, default=200, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unseen", type=float, default=0.25, help="share of the names that only validation has; half of its things"
    )
    parser.add_argument("--max-objects", type=int, default=6, help="things in an image at most")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1)

    def run(args: argparse.Namespace) -> None:
        from pix2seq.data.things import write_things

        seen, unseen = write_things(
            args.folder,
            args.cutouts,
            num_train=args.train,
            num_val=args.val,
            size=args.size,
            seed=args.seed,
            unseen_share=args.unseen,
            max_objects=args.max_objects,
            backgrounds=args.backgrounds,
            workers=args.workers,
        )
        print(
            f"{args.train} training and {args.val} validation images in {args.folder}, of {seen} names that training "
            f"sees and {unseen} that it does not"
        )

    parser.set_defaults(run=run)


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the options of the data check."""
    _add_examples(parser, "data check MY_DATA", "data check MY_DATA --json --images")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", help="one split; all that are found by default")
    _add_annotations(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--images", action="store_true", help="with --json: also every image with its annotations")

    def run(args: argparse.Namespace) -> int:
        from pix2seq.data.check import check_dataset

        if args.images and not args.json:
            raise InputError("--images lists images in JSON; add --json")
        report = check_dataset(args.folder, args.split, annotations=args.annotations)
        print(json.dumps(report.to_json(with_images=args.images), indent=2) if args.json else report.text())
        return 0 if report.usable else 2

    parser.set_defaults(run=run)


def add_shard(parser: argparse.ArgumentParser) -> None:
    """Add the options of writing shards."""
    _add_examples(parser, "data shard MY_DATA shards")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder to write; data=OUT, or its http address, trains from it")
    parser.add_argument("--split", help="one split; all that are found by default")
    parser.add_argument("--samples-per-shard", type=_positive, default=500, help="images in a tar file")

    def run(args: argparse.Namespace) -> None:
        from pix2seq.data.dataset import find_splits, open_dataset
        from pix2seq.data.formats.shards import write_shards

        for split in [args.split] if args.split else find_splits(args.folder) or ["train"]:
            dataset = open_dataset(args.folder, split)
            index = write_shards(dataset, args.out, samples_per_shard=args.samples_per_shard, progress=True)
            print(f"{split}: {len(index)} of {len(dataset)} images in {len(index.shards)} shards in {args.out}")

    parser.set_defaults(run=run)


def add_features(parser: argparse.ArgumentParser) -> None:
    """Add the options of storing features."""
    _add_examples(parser, "data features MY_DATA features --checkpoint runs/first")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder to write; features=OUT trains from it")
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--checkpoint", type=Path, help="checkpoint or run folder, to train with init=CHECKPOINT")
    encoder.add_argument("--encoder", help="timm model with its pretrained weights, as model.encoder.name=ENCODER")
    parser.add_argument("--split", default="train")
    parser.add_argument("--augmentations", type=_positive, default=1, help="variants of an image; 1 is a plain resize")
    parser.add_argument("--config", help="YAML file of settings, see configs/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that go over the file's")

    def run(args: argparse.Namespace) -> None:
        from pix2seq.training.config import load_config
        from pix2seq.training.recipe import store_features

        fixed = {"data": str(args.folder), "train_split": args.split}
        settings = args.settings
        if args.checkpoint is not None:
            fixed["init"] = str(args.checkpoint)
        else:
            settings = [f"model.encoder.name={args.encoder}", "model.encoder.pretrained=true", *settings]
        config = load_config(args.config, settings, **fixed)
        store = store_features(config, args.out, augmentations=args.augmentations, progress=True)
        print(f"{args.split}: features of {len(store)} images, {store.num_bytes} bytes, in {args.out}")

    parser.set_defaults(run=run)


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Add the options of recording answers."""
    _add_examples(parser, "data answers MY_DATA answers --checkpoint runs/clicks --task prompted")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="folder for the file, named by its content: TASK.answers=FILE reads it")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder")
    parser.add_argument("--task", required=True, help="one task that learns from its own answers")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=_positive, default=0, help="only the first N images")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--seed", type=_seed, default=0, help="of what is asked, 0 to 2**64 - 1")
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        tasks = parse_tasks(args.task)
        from pix2seq.data.dataset import open_dataset
        from pix2seq.predictor import Predictor
        from pix2seq.rehearsal import record_answers

        predictor = Predictor.from_pretrained(args.checkpoint, device=args.device, bf16=args.bf16)
        dataset = open_dataset(args.folder, args.split)
        options = {"batch_size": args.batch_size, "limit": args.limit, "seed": args.seed, "progress": True}
        for name in tasks:
            print(record_answers(predictor, dataset, name, args.out, **options))

    parser.set_defaults(run=run)


def add_filter_captions(parser: argparse.ArgumentParser) -> None:
    """Add the options of filtering captions."""
    _add_examples(
        parser,
        "data captions filter MY_DATA --checkpoint runs/mine --out filtered --min-score 0.6",
        "data captions filter written --checkpoint runs/mine --out filtered --best 5",
    )
    _add_captions(parser)
    parser.add_argument(
        "--min-score", type=_share, default=0.5, help="least probability of being true; by default 0.5, 0 keeps all"
    )
    parser.add_argument("--best", type=_positive, metavar="K", help="captions to keep of an image at most")

    def run(args: argparse.Namespace) -> None:
        from pix2seq.caption_filter import FILTER_REPORT, CaptionFile, filter_captions
        from pix2seq.predictor import Predictor

        captions = CaptionFile.read(args.folder, args.split, annotations=args.annotations)
        predictor = Predictor.from_pretrained(args.checkpoint, device=args.device, bf16=args.bf16)
        options = {"min_score": args.min_score, "best": args.best, "batch_size": args.batch_size, "progress": True}
        report = filter_captions(predictor, captions, args.out, **options)
        kept, dropped = (sum(report[name].values()) for name in ("kept", "dropped"))
        print(f"{kept} captions kept and {dropped} dropped, in {args.out}; why, in {args.out / FILTER_REPORT}")

    parser.set_defaults(run=run)


def add_write_captions(parser: argparse.ArgumentParser) -> None:
    """Add the options of writing captions."""
    _add_examples(parser, "data captions write MY_DATA --checkpoint runs/mine --out written --per-image 3")
    _add_captions(parser)
    parser.add_argument("--per-image", type=_positive, default=2, metavar="N", help="captions to sample for an image")
    parser.add_argument("--top-p", type=_share, default=0.9, help="share of the probability that is sampled from")
    parser.add_argument("--seed", type=_seed, default=0, help="of sampling, 0 to 2**64 - 1")

    def run(args: argparse.Namespace) -> None:
        from pix2seq.caption_filter import WRITE_REPORT, CaptionFile, write_captions
        from pix2seq.predictor import Predictor

        captions = CaptionFile.read(args.folder, args.split, annotations=args.annotations, needed=False)
        predictor = Predictor.from_pretrained(args.checkpoint, device=args.device, bf16=args.bf16)
        report = write_captions(
            predictor,
            captions,
            args.out,
            num_captions=args.per_image,
            top_p=args.top_p,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=True,
        )
        print(f"{report['added']['written']} captions added, in {args.out}; which, in {args.out / WRITE_REPORT}")

    parser.set_defaults(run=run)


def add_sequences(parser: argparse.ArgumentParser) -> None:
    """Add the options of showing training sequences."""
    _add_examples(parser, "data sequences MY_DATA --task detection --out seen.png")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default=DEFAULT_TASK, help=f"one task: {', '.join(task_names())}")
    parser.add_argument("--index", type=int, default=0, help="number of the sample, from 0")
    parser.add_argument("--epoch", type=int, default=0, help="augmentation and noise differ from epoch to epoch")
    parser.add_argument("--split", default="train")
    parser.add_argument("--config", help="YAML file of settings, see configs/")
    parser.add_argument("--out", type=Path, help="image to write")
    parser.add_argument("--tokens", action="store_true", help="draw the tokens and their meaning beside the image")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that go over the file's")

    def run(args: argparse.Namespace) -> None:
        tasks = parse_tasks(args.task)
        if len(tasks) != 1:
            raise InputError(f"{args.task!r} names {len(tasks)} tasks; ask for one at a time")
        if args.tokens and not args.out:
            raise InputError("--tokens draws an image; say where with --out FILE")
        from pix2seq.sequences import SequenceView
        from pix2seq.training.config import load_config

        fixed = {"tasks": list(tasks), "data": str(args.folder), "train_split": args.split}
        view = SequenceView(load_config(args.config, args.settings, **fixed), tasks[0], args.index, epoch=args.epoch)
        if args.out:
            view.save(args.out, tokens=args.tokens)
        print(view.text())

    parser.set_defaults(run=run)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo."""
    _add_examples(parser, "demo", "demo --checkpoint runs/mine --images 8 --seed 3")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--checkpoint", type=Path, help="checkpoint or run folder; by default the repository's model")
    parser.add_argument("--images", type=_positive, help="number of new images")
    parser.add_argument("--seed", type=int, help="of the images; another seed gives other images")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--train", action="store_true", help="train a detector from scratch instead, in minutes")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of --train over configs/demo.yaml")

    def run(args: argparse.Namespace) -> None:
        given = {"checkpoint": args.checkpoint, "num_images": args.images, "seed": args.seed, "device": args.device}
        given = {name: value for name, value in given.items() if value is not None}
        if given if args.train else args.settings:
            raise InputError(
                "demo --train takes key=value settings, and demo without --train takes --checkpoint, --images, --seed "
                "and --device"
            )
        from pix2seq.demo import show_demo, train_demo

        if args.train:
            train_demo(args.out, args.settings)
        else:
            show_demo(args.out, **given)

    parser.set_defaults(run=run)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the options of shell completion."""
    _add_examples(
        parser,
        "completion bash > ~/.local/share/bash-completion/completions/pix2seq",
        "completion zsh > ~/.zfunc/_pix2seq     # a folder of $fpath",
        "completion fish > ~/.config/fish/completions/pix2seq.fish",
    )
    parser.add_argument("shell", choices=SHELLS)

    def run(args: argparse.Namespace) -> None:
        import shtab

        whole = make_parser()
        for action in _actions(whole):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(whole, args.shell))

    parser.set_defaults(run=run)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server."""
    _add_examples(parser, "serve --checkpoint runs/mine --examples photos")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint or run folder; by default the repository's model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines too")
    parser.add_argument("--port", type=_port, default=7860, help="0 takes any that is free")
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help="images to try; by default generated ones")
    parser.add_argument("--index", type=Path, help="index of a folder to search on the page; see pix2seq index")
    parser.add_argument("--max-bytes", type=_positive, help="of a request; by default 20 MiB")
    parser.add_argument("--max-pixels", type=_positive, help="of an image; by default 34 million")
    parser.add_argument("--max-requests", type=_positive, help="at the same time, waiting ones included; by default 16")
    parser.add_argument("--timeout", type=_positive, help="seconds from a request to its answer; by default 60")
    parser.add_argument("--max-kept-images", type=_positive, help="encoded, waiting for clicks; by default 32")
    parser.add_argument("--max-kept-bytes", type=_positive, help="of all kept images; by default 256 MiB")
    _add_device(parser)

    def run(args: argparse.Namespace) -> None:
        names = ("max_bytes", "max_pixels", "max_requests", "timeout", "max_kept_images", "max_kept_bytes")
        limits = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        from pix2seq.web.server import serve

        serve(
            args.checkpoint,
            host=args.host,
            port=args.port,
            examples=args.examples,
            index=args.index,
            limits=limits,
            device=args.device,
            bf16=args.bf16,
        )

    parser.set_defaults(run=run)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield what a parser and the parsers of its commands take."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _add_annotations(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="COCO file of the split, if several could be")


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="COCO folder, which stays as it is")
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint or run folder")
    parser.add_argument("--out", required=True, type=Path, help="new folder: the captions, a report, links to the rest")
    parser.add_argument("--split", default="train", help="other splits stay as they are")
    _add_annotations(parser)
    parser.add_argument("--batch-size", type=_positive, default=16)
    _add_device(parser)


def _add_task(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(task_names())
    parser.add_argument("--task", help=f"tasks, separated by commas: {names}; by default all that the checkpoint knows")


def _settings(args: argparse.Namespace) -> dict[str, int]:
    """Return the settings of tasks that were given as options."""
    given = {"num_objects": args.num_objects, "num_samples": args.num_samples}
    return {name: value for name, value in given.items() if value is not None}


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-objects", type=_positive, help="how many objects to ask for; by default as trained")
    parser.add_argument("--num-samples", type=_positive, help="masks drawn for each object, which vote; 1 for speed")
    parser.add_argument("--seed", type=_seed, default=0, help="of sampling, 0 to 2**64 - 1")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast; faster, scores differ in the third digit")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files at --out that others wrote")


if __name__ == "__main__":
    sys.exit(main())
