"""Threads on the CPU: a run tries both forms in fixed steps, keeps the faster, and resumes with what it chose."""

import os
import subprocess
import sys

import pytest
import torch

from pix2seq.training.threads import ALL_CORES, ALONE, SET_BY_USER, ThreadTrial

LAST = ALONE[-1]


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores whose user set nothing; returns the threads set last."""
    threads = [4]
    for name in SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


def train(trial, machine, seconds, start=0, stop=LAST + 4):
    """Run steps of `seconds[threads]`; return the threads of each."""
    used = []
    for step in range(start, stop):
        trial.before_step(step)
        used.append(machine[-1])
        trial.after_step(step, seconds[machine[-1]])
    return used


def test_busy_cores_leave_one_thread(machine, capsys):
    trial = ThreadTrial(None)
    assert train(trial, machine, {4: 1.0, 1: 0.5}) == [4] * ALONE[0] + [1] * (len(ALONE) + 3)
    assert trial.one_thread is True
    assert capsys.readouterr().err.count("one thread") == 1


@pytest.mark.parametrize("alone", [1.3, 1.0, 0.9])
def test_idle_cores_are_all_used(machine, alone, capsys):
    trial = ThreadTrial(None)
    assert train(trial, machine, {4: 1.0, 1: alone}) == [4] * ALONE[0] + [1] * len(ALONE) + [4] * 3
    assert trial.one_thread is False
    assert not capsys.readouterr().err


def test_two_slow_steps_decide_nothing(machine):
    trial = ThreadTrial(None)
    for step in range(LAST + 1):
        trial.before_step(step)
        trial.after_step(step, 9.0 if step in ALL_CORES[:2] else 1.0)
    assert trial.one_thread is False


@pytest.mark.parametrize("killed", range(LAST + 3))
@pytest.mark.parametrize("alone", [0.5, 1.3])
def test_a_resumed_run_uses_the_threads_of_the_run_it_continues(machine, killed, alone):
    seconds = {4: 1.0, 1: alone}
    whole = train(ThreadTrial(None), machine, seconds)
    machine.append(4)
    first = ThreadTrial(None)
    used = train(first, machine, seconds, stop=killed)
    machine.append(4)  # a new process
    used += train(ThreadTrial(first.one_thread), machine, seconds, start=killed)
    if alone > 1 or killed not in range(ALL_CORES[-1] + 1, LAST + 1):
        assert used == whole
    else:  # without a time of each form, a run keeps all threads
        assert used[: LAST + 1] == whole[: LAST + 1]


@pytest.mark.parametrize("name", SET_BY_USER)
@pytest.mark.parametrize("chosen", [None, True, False])
def test_what_the_user_set_is_kept(machine, monkeypatch, name, chosen):
    monkeypatch.setenv(name, "4")
    assert set(train(ThreadTrial(chosen), machine, {4: 1.0, 1: 0.1})) == {4}


def spin_count(**variables):
    """Return GOMP_SPINCOUNT of a command that was started with these variables."""
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, sys; from pix2seq.cli import main; main(['data']); print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def test_commands_spin_briefly_unless_the_user_chose():
    assert spin_count() == "5000"
    assert spin_count(GOMP_SPINCOUNT="7") == "7"
    assert spin_count(OMP_WAIT_POLICY="active") == "None"
