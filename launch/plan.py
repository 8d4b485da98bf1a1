"""Plan a run before anything is bought: parameters, operations, memory, traffic, time, cost. Needs no device.

    deepseek-jax plan                                          # the published run: V3 on 2,048 H800
    deepseek-jax plan --config=v3_671b --chip=h200 --devices=1024 --config.mesh.pipe=8 --schedule=dualpipev
    deepseek-jax plan --config=v2_236b                         # and how it compares with the 67B before it
    deepseek-jax plan --config=tiny_v3 --chip=h100 --devices=8 --config.mesh.expert=4
    deepseek-jax plan --config=v3_671b --chip=h200 --devices=256 --suggest      # meshes that fit, the fastest first
    deepseek-jax plan --config=v2_lite --chip=64xh100 --suggest                 # v5p-512, v6e-256: chips and how many
    deepseek-jax plan --chip=mine:bf16=989,fp8=1979,memory=80,hbm=3350,fast=450,reach=8,network=50 --step-time-s=19.926
    deepseek-jax plan --config=tiny_v3 --config.mesh.expert=4 --loads=runs/tiny_v3      # what redundant experts gain
    deepseek-jax plan --config=r1_zero --chip=h800 --devices=512 --config.mesh.expert=64 --rl    # updates and rollouts
    deepseek-jax plan --json > plan.json
    deepseek-jax plan --picture=memory.png                     # bars: the memory of a device, part by part
    deepseek-jax plan --draw=schedule.svg                      # what each device along the pipeline runs, over time
    deepseek-jax plan --compile                                # compiles the step for 2,048 devices that need not exist

Everything follows from the shapes of the weights and stated formulas (the modules of deepseek_jax.plan say which), and
every number says what it is: derived, published, given, or fitted (it rests on the one efficiency that was calibrated
for the recipe). What is not given is taken from the published run of that model where one is known: devices,
config.mesh.pipe, config.mesh.expert, --schedule, --recipe, --tokens, --against. For any other model: as many devices
as its mesh says, 1F1B, recipe run. A published step time joins the table if the plan is that of the published run.

A plan opens with its verdict. --suggest looks for meshes, sharding rules, micro-batches and recomputation that fit
and says which of them deepseek-jax train can run today; a plan that does not fit ends with the same.

--compile traces, lowers and compiles the step that deepseek-jax train would run in this layout, in a process of its
own and without allocating any weight, for emulated CPU devices or for --target: h100, h200 and h800 (with the CUDA
plugin of jax installed) or a TPU slice by its shape, v5p:8x16x16 (with libtpu). It reports the memory of a device
beside the plan's, every kind of collective with its axes, count and bytes, and what compiling took. It stops when
the process takes more than --memory. The recipe is run; the batch is the one after the ramp.

Recipes: run is what deepseek-jax train does (float32 weights; config.precision, config.run.remat); bf16 keeps
bfloat16 weights over float32 ones that are split over the replicas; v3 is the report's FP8 training and recomputation.
In a pipeline config.pipeline.micro_batches=1 stands for one sequence per micro-batch. A run divides embedding and head
over its ranks. Its devices all keep as much as the rank with the most weights needs, and the plan counts this for each.
With config.lora.rank=16 adapters alone have gradients and moments.
"""

from typing import TYPE_CHECKING

from deepseek_jax import run_config
from deepseek_jax.bounds import besides, number, path, whole
from deepseek_jax.launch import _options

if TYPE_CHECKING:
    pass

DEFAULT = "v3_671b"
EXTRA = {
    "chip": (str, "", "like h100, 8xh100, v5p-512, or NAME:KEY=NUMBER,… over a known one (default: h800)"),
    "devices": (int, 0, "how many chips; 0: as --chip says, as published, or as config.mesh says", whole(0, 10**9)),
    "suggest": (bool, False, "name meshes that fit, the fastest first, instead of planning the config's own"),
    "schedule": (str, "", "1f1b, 1f1b_paired, zb1p, dualpipe or dualpipev; of the pipeline"),
    "recipe": (str, "", "run, bf16 or v3; what is kept in which format"),
    "efficiency": (
        float,
        0.0,
        "of matmuls, of their peak; 0: as calibrated for the recipe",
        besides(number(1e-6, 1), 0),
    ),
    "step_time_s": (float, 0.0, "a measured step, in seconds", besides(number(1e-6, 1e9), 0)),
    "tokens": (
        float,
        0.0,
        "of the whole run; 0: as published, or as config.loop.steps says",
        besides(number(1, 1e18), 0),
    ),
    "rl": (bool, False, "plan a step of deepseek-jax rl: its updates, and the memory of its rollouts (config.rl)"),
    "price": (float, 2.0, "dollars for an hour of one chip", besides(number(1e-6, 1e6), 0)),
    "against": (str, "", "another config to compare with"),
    "loads": (
        str,
        "",
        "workdir of a run: its experts' loads, the imbalance of devices, redundant experts",
        path(),
    ),
    "compile": (bool, False, "compile the training step, and compare its memory with the plan's"),
    "target": (str, "cpu", "what --compile compiles for: cpu, h100, h200, h800, or a TPU slice like v5p:8x16x16"),
    "memory": (float, 8.0, "GiB that compiling may take before it is stopped", number(0.1, 1e4)),
    "json": (bool, False, "print one JSON object"),
    "picture": (str, "", "file for a bar chart of the memory, like memory.png", path()),
    "draw": (str, "", "file for a drawing of the pipeline's schedule, like schedule.svg", path()),
}


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, DEFAULT, EXTRA, workdir=False)
    config = run_config.validate(options.config)
    from deepseek_jax.launch import _plan  # which imports jax

    return _plan.run(config, options)
