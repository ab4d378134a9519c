"""Processes forked from one that has imported everything: importing PyTorch takes seconds of processor time in each."""

import multiprocessing
import os
import socket
from multiprocessing import connection

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["dying", "pix2seq.training.recipe", "pycocotools.cocoeval", "torch.distributed.fsdp"])


def _run(start_method, function, args):
    # Data workers then start as in a command. By default, the fork server's child would start another fork server for
    # them, which imports everything again.
    multiprocessing.set_start_method(start_method, force=True)
    function(*args)


def forked(function, *args):
    """Return a process that will run a function; start it with `start()`."""
    return context.Process(target=_run, args=(multiprocessing.get_start_method(), function, args))


def _run_rank(function, args, environment, log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    function(*args)


def run_ranks(function, *args, folder, size=2, timeout=600):
    """Run a function in `size` processes, with the environment that torchrun would give them.

    `folder` gets what each of them prints. Fails if one of them does, with what that one printed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {}
    for rank in range(size):
        log = folder / f"rank-{rank}.txt"
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = forked(_run_rank, function, args, environment, log)
        process.start()
        ranks[process.sentinel] = process, log
    try:
        while ranks:
            ended = connection.wait(ranks, timeout)
            assert ended, f"{len(ranks)} of {size} processes have not ended after {timeout} s"
            for sentinel in ended:
                process, log = ranks.pop(sentinel)
                process.join()
                assert process.exitcode == 0, log.read_text()
    finally:
        for process, _ in ranks.values():  # the others would wait for one that failed
            process.kill()
            process.join()
