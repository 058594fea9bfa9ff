"""The tests mirror the modules: the tests of ``flowtrain/core/compile.py`` are ``tests/core/test_compile.py``.

Those of ``executors/flowtrain_dask/lanes/gate.py`` are ``tests/executors/lanes/test_gate.py``. Every module has such a
file, and every other file of tests is in `OTHERS`, with what it tests instead. No file has more than 700 lines.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
SOURCES = {ROOT / "flowtrain": "", ROOT / "executors" / "flowtrain_dask": "executors/"}
LIMIT = 700

# Modules without a file of their own, and the file that tests them.
ELSEWHERE = {
    "core/data_parallel": "ranks/test_same_training",
    "core/replica": "ranks/test_replica",
    "core/sharding": "ranks/test_sharded",
    "core/unsent_gradients": "ranks/test_sharded",
    "core/world": "ranks/test_world",
    "errors/arguments": "test_whole_numbers",
    "errors/describing": "test_errors",
    "diagnostics/recording_view": "diagnostics/test_suggest_access",
    "diagnostics/recording/decoding": "diagnostics/recording/test_encoding",
    "diagnostics/recording/file": "diagnostics/recording/test_replay",
    "diagnostics/recording/shown": "diagnostics/recording/test_replay",
    "examples/classifier": "examples/test_programs",
    "examples/distillation": "examples/test_programs",
    "examples/huggingface": "examples/test_programs",
    "graph/serial": "graph/test_executor",
    "state/arrivals": "state/test_late_writes",
    "executors/lanes/answers": "executors/test_late_writes",
    "executors/deferred/plans": "executors/deferred/test_deferred_callbacks",
    "executors/lanes/lane_set": "executors/deferred/test_shutdown",
    "executors/route": "executors/test_executor",
    "logging/records": "logging/test_backend",
    "state/shards": "ranks/test_sharded",
    "testing/probes": "testing/test_contract",
    "training/checkpoint/lock_file": "training/checkpoint/test_folder_lock",
    "training/checkpoint/parts": "ranks/test_together",
    "training/checkpoint/rank_checkpoints": "ranks/test_checkpoints",
    "training/checkpoint/shard_files": "ranks/test_shard_files",
    "training/ranks/batch_sync": "ranks/test_one_alone",
    "training/ranks/batches": "ranks/test_data",
    "training/ranks/ranks": "ranks/test_one_alone",
    "training/step_errors": "training/test_step",
    "training/sync": "ranks/test_together",
    "training/together": "ranks/test_together",
}

# The files that test no single module, and their subjects.
OTHERS = {
    "test_accelerator": "the tests of tests/accelerator, in a process of their own",
    "test_arguments": "arguments that are refused where they are given, in all callbacks and backends",
    "test_costs": "the numbers of calls that a step may make",
    "test_docs": "the programs in the guides and in the README",
    "test_errors": "the errors of the package flowtrain.errors, and how several failures are merged",
    "test_evaluations": "additional evaluations, in logs, checkpoints and callbacks",
    "test_exports": "the public names of all packages",
    "test_extras": "the extras of the package, each without the others",
    "test_gone": "learners that are dropped, and then freed",
    "test_ignores": "the lines that type checkers ignore, each with its reason",
    "test_layers": "which package imports from which",
    "test_mirror": "the files of tests",
    "test_nested": "every function that walks through values of users",
    "test_notebook": "training in the cells of a notebook",
    "test_reference": "the generated reference of callbacks",
    "test_release": "the archives of a release",
    "test_same_training": "three fits, loops by hand, and the recorded losses of both",
    "test_typing": "the types of the public interface, for both type checkers",
    "test_versions": "the program that runs the tests with other versions",
    "test_whole_numbers": "every argument that is a whole number",
    "accelerator/test_failures": "the simulated accelerator: devices that fail in training",
    "accelerator/test_mutations": "the simulated accelerator: changed sources, each of which it must find",
    "accelerator/test_seam": "the module through which flowtrain sees an accelerator, on a simulated one",
    "accelerator/test_simulated_memory": "the simulated accelerator: its memory",
    "accelerator/test_simulated_operators": "the simulated accelerator: its operators",
    "accelerator/test_simulated_order": "the simulated accelerator: its streams and events",
    "accelerator/test_simulated_races": "the simulated accelerator: the races that it finds",
    "accelerator/test_trainings": "whole trainings on the simulated accelerator",
    "callbacks/test_bundled": "all bundled callbacks",
    "callbacks/test_changed_at_resume": "every bundled callback: dropped, added or renamed at a resume",
    "callbacks/test_going_back": "Checkpointer: runs that go back to an earlier checkpoint",
    "callbacks/test_merged_metrics": "the values of an epoch over several ranks",
    "callbacks/test_torchmetrics": "torchmetrics objects in `Metrics`, in checkpoints and in what watches them",
    "examples/test_programs": "the example programs, started as such",
    "executors/lanes/test_lane_work": "lanes, as the thread sees them that works on them",
    "executors/parallel/test_firing_timed": "firings that are measured; the other tests of firings fill a file",
    "executors/test_backends": "logging backends under every executor",
    "executors/test_contract": "the contract of executors",
    "executors/test_deferred_failures": "failures of deferred callbacks, from the lane to the training thread",
    "executors/test_deferred_properties": "deferred callbacks compared with the serial result, on random examples",
    "executors/test_deferred_values": "the values that deferred callbacks see",
    "executors/test_drawing": "deferred callbacks that draw random numbers",
    "executors/test_late_writes": "writes with a lag under every executor, on random examples",
    "executors/test_timelines": "timelines of callbacks in lanes, on threads and on a cluster",
    "executors/test_properties": "the parallel executor compared with the serial one, on random examples",
    "ranks/test_checkpoints": "checkpoints of several ranks, in real processes",
    "ranks/test_collectives": "the number of messages between ranks in a batch",
    "ranks/test_data": "the data of several ranks, in real processes",
    "ranks/test_declarations": "declared exchanges between ranks, and refusals, with real processes",
    "ranks/test_gradients": "sparse and complex gradients of several ranks",
    "ranks/test_harness": "the processes in which tests run a function on several ranks",
    "ranks/test_one_alone": "a rank that alone cancels, fails, is interrupted, killed or suspended",
    "ranks/test_together": "the contracts of the batches, the loop and the checkpoints of one process and of ranks",
    "ranks/test_replica": "the contract of the models of one process, of DDP and of shards",
    "ranks/test_same_training": "training on several ranks, compared with DDP by hand",
    "ranks/test_refusals": "what ranks refuse, and what DDP alone would get wrong",
    "ranks/test_shard_files": "checkpoints of a sharded model, in real processes",
    "ranks/test_sharded": "sharded training (FSDP), compared with DDP",
    "ranks/test_torchrun": "programs under torchrun itself",
    "ranks/test_kills": "ranks that are killed, and trainings that resume",
    "ranks/test_random_callbacks": "random callbacks on several ranks, accepted and refused, with real processes",
    "ranks/test_measured": "what several ranks measure and log",
    "training/checkpoint/test_long_runs": "histories and checkpoints of long runs",
    "training/checkpoint/test_stateful_loader": "resume with a loader that keeps its position",
    "ranks/test_world": "the contract of the exchanges between ranks",
    "ranks/test_ways": "random ranks that cancel or fail in every way to train",
    "ranks/test_unlike": "ranks with unlike settings, models, optimizers, data or calls, with real processes",
    "training/checkpoint/test_sharded": "resume with the share that one of several ranks has in a loader",
    "training/test_interrupts_groups": "signals to a group of processes; the file is also the program that gets them",
    "training/test_model_inputs": "models of several inputs, in the loop and in callbacks",
}


def modules() -> set[str]:
    """Return the modules, each by the place of its tests."""
    return {
        place + path.relative_to(folder).with_suffix("").as_posix()
        for folder, place in SOURCES.items()
        for path in folder.rglob("*.py")
        if path.stem != "__init__"
    }


def files() -> dict[str, Path]:
    """Return the files of tests by their names."""
    return {path.relative_to(TESTS).with_suffix("").as_posix(): path for path in sorted(TESTS.rglob("test_*.py"))}


def mirrored(name: str) -> str:
    """Return the name of the file that tests a module."""
    folder, _, stem = name.rpartition("/")
    return f"{folder}/test_{stem}" if folder else f"test_{stem}"


def test_every_module_has_a_file_of_tests_and_every_other_file_says_what_it_tests() -> None:
    wanted = {mirrored(name) for name in modules() - ELSEWHERE.keys()}
    found = files().keys()
    assert sorted(wanted - found) == [], "modules without tests"
    assert sorted(found - wanted - OTHERS.keys()) == [], "files that test no module: name them after one, or in OTHERS"
    assert sorted(OTHERS.keys() - (found - wanted)) == [], "no such file, or it has a module now"
    assert ELSEWHERE.keys() <= modules()
    assert set(ELSEWHERE.values()) <= found


def test_no_file_is_too_long() -> None:
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in files().items()}
    assert {name: count for name, count in lines.items() if count > LIMIT} == {}, "split it along the modules it tests"
