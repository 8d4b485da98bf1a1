"""SIGKILL of both processes of a run at every write of a save: what is restored, and what the run then comes to.

A save of two processes makes some writes. For each of them a run is killed just before that write, the other process
with it, and started again: it must restore the step before, bit for bit (or the new one, if its COMMIT was there), and
end with the losses of a run that nobody disturbed.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import buckets

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(3600)]
STEPS, LAST_GOOD = 4, 1
# Imports JAX once; the processes of each run are its forks, and use no device before.
SCRIPT = """
import hashlib, itertools, json, os, pathlib, signal, socket, sys, time, traceback
import jax, jax.numpy as jnp, numpy as np, tensorstore
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from deepseek_jax.compat import start_processes
from deepseek_jax.storage import Store
from deepseek_jax.train.checkpoint import writer
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

STEPS, LAST_GOOD = int(sys.argv[3]), int(sys.argv[4])
writer.RENEW_S, writer.DEAD_S, writer.LOOK_S = 0.2, 1.0, 0.05


def run(index, port, where, kill, out):
    os.environ.update(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index))
    start_processes()
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    places = {"w": NamedSharding(mesh, P("x")), "b": NamedSharding(mesh, P())}

    def step(state):
        loss = jnp.mean(jnp.sin(state["w"]) + state["b"])
        return {"w": state["w"] * 1.25 + loss, "b": state["b"] - loss / 3}, loss

    step = jax.jit(step, out_shardings=(places, None))
    shapes = {"w": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=places["w"]),
              "b": jax.ShapeDtypeStruct((6,), np.float32, sharding=places["b"])}
    numbers, is_saving = itertools.count(), [False]

    def counted(call):
        def counting(store, name, *words):
            if is_saving[0] and name != writer.LEASE:
                number = next(numbers)
                if kill == [index, number]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(store, name, *words)
        return counting

    for method in ("write", "write_if_absent", "exchange"):
        setattr(Store, method, counted(getattr(Store, method)))
    answer = {"restored": 0, "losses": []}
    with Checkpointer(where, warn=lambda text: print(text, file=sys.stderr)) as checkpoints:
        if checkpoints.latest() is None:
            state = {"w": jnp.arange(48, dtype=jnp.float32).reshape(8, 6) / 7, "b": jnp.arange(6, dtype=jnp.float32)}
            state = jax.jit(lambda: state, out_shardings=places)()
        else:
            answer["restored"], state, _ = checkpoints.restore(shapes)
        for number in range(answer["restored"] + 1, STEPS + 1):
            own = [np.asarray(shard.data) for x in jax.tree.leaves(state) for shard in x.addressable_shards]
            answer[f"state after {number - 1}"] = hashlib.sha256(b"".join(x.tobytes() for x in own)).hexdigest()
            state, loss = step(state)
            answer["losses"].append([number, float(loss).hex()])
            is_saving[0] = number == LAST_GOOD + 1
            checkpoints.save(number, state)
            assert checkpoints.wait()
            if is_saving[0]:
                answer["writes"] = next(numbers)
                is_saving[0] = False
    pathlib.Path(f"{out}.{index}").write_text(json.dumps(answer))


def start(where, kill, out):
    '''Two processes; the exit codes. Where one is killed, the other is as well.'''
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for index in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                run(index, port, where, kill, out)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = {}
    while len(codes) < 2:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] and len(codes) < 2:
            for other in children:
                if other != child:
                    os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


base, out, found = sys.argv[1], sys.argv[2], []
read = lambda: [json.loads(pathlib.Path(f"{out}.{index}").read_text()) for index in range(2)]
assert start(f"{base}/whole", None, out) == [0, 0]
whole = read()
for victim in range(2):
    for number in range(whole[victim]["writes"]):
        where = f"{base}/{victim}-{number}"
        killed = start(where, [victim, number], out)
        again = start(where, None, out)
        found.append({"victim": victim, "number": number, "killed": killed, "again": again, "answers": read()})
        print(victim, number, killed, again, read()[0]["restored"], file=sys.stderr, flush=True)
print(json.dumps({"whole": whole, "found": found}))
"""


@pytest.mark.parametrize("name", buckets.FOUND)
def test_a_kill_at_any_write_of_a_save_loses_nothing_before_it(name, tmp_path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | buckets.variables(name) | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    where = buckets.new_place(name, tmp_path)
    words = [sys.executable, "-c", SCRIPT, where, str(tmp_path / "out"), str(STEPS), str(LAST_GOOD)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    whole, found = answer["whole"], answer["found"]
    assert len(found) >= 6 and {one["victim"] for one in found} == {0, 1}
    steps = []
    for one in found:
        assert -9 in one["killed"] and one["again"] == [0, 0], one
        for index, again in enumerate(one["answers"]):
            step = again["restored"]
            assert step in (LAST_GOOD, LAST_GOOD + 1), one
            assert again[f"state after {step}"] == whole[index][f"state after {step}"], one
            assert again["losses"] == whole[index]["losses"][step:], one
        steps.append(one["answers"][0]["restored"])
    assert LAST_GOOD in steps
    print(f"{name}: {len(found)} kills of two processes; restored step {LAST_GOOD} {steps.count(LAST_GOOD)} times")
