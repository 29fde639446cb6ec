"""Processes that tests kill, forked from a server without threads: a fork of the tests' own process inherits locks that
its threads hold, and waits for them for ever."""

import multiprocessing

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mmf_fast.data.prepare", "mmf_fast.train", "mmf_fast.training.engines.deepspeed"])
