"""The table of tasks. A new one is a tokenizer, a file here, and a line in this table."""

from pix2seq.tasks.detection import Detection

TASKS: dict[str, type[Detection]] = {Detection.name: Detection}
