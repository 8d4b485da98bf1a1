"""Every key of a run with its default; a config is this plus a family's numbers and a few assignments.

The meaning of each model number stands in the family's dataclass; here stand the keys of the run.
"""

from ml_collections import ConfigDict

from deepseek_jax.kernels import TABLE


def get_config() -> ConfigDict:
    """Returns the defaults shared by all runs; the config that starts here fills in `family` and `model`."""
    config = ConfigDict()
    config.name = ""
    config.family = ""
    config.seed = 0
    config.precision = "fp32"  # bf16: bf16 over fp32 masters; fp8: V3's recipe; fp4: that, and V4's rounding to FP4
    config.model = ConfigDict()

    # What the published model that a run begins with says of itself; exports say it again. Filled in by train.
    release = config.release = ConfigDict()
    release.folder = ""  # where its tokenizer, chat template and settings for generation are; "": no published model
    release.n_positions = 0  # tokens of the longest sequence it is meant for, if more than data.seq_len
    release.bos_id = None
    release.pad_id = None
    release.eos_ids = ()  # marks of end in config.json; () takes the tokenizer's
    release.end_ids = ()  # ids at which generation stops, besides those and the tokenizer's

    mesh = config.mesh = ConfigDict()
    mesh.pipe = 1  # devices along the pipeline
    mesh.data = -1  # devices along the data axis; -1 takes all that are left
    mesh.expert = 1  # devices over which the routed experts are split
    mesh.context = 1  # devices over which each sequence is split

    pipeline = config.pipeline = ConfigDict()
    # parts into which a device splits its share of a batch; they go through the pipeline, and without one (mesh.pipe=1)
    # one after the other: gradient accumulation
    pipeline.micro_batches = 1
    pipeline.schedule = "1f1b"  # gpipe, 1f1b, 1f1b_paired, zb1p, dualpipe or dualpipev (V3 section 3.2.1)
    pipeline.put_off = -1  # weight gradients that a device puts off at most, each in memory; -1: as the schedule does

    exchange = config.exchange = ConfigDict()  # of tokens with the devices of their experts; where mesh.expert > 1
    exchange.kind = "padded"  # whole buffers; ragged: only their filled rows, not on CPUs, and slow on GPUs
    exchange.groups = 1  # of devices, to each of which a token goes once and is sent on from there (nodes); 1: directly

    # Logical axis of a weight -> mesh axis it is split over ("" keeps it whole). embed="data" gives FSDP.
    sharding = config.sharding = ConfigDict()
    sharding.experts = "expert"
    sharding.embed = ""
    sharding.vocab = ""
    sharding.heads = ""
    sharding.mlp = ""
    sharding.q_latent = ""
    sharding.kv_latent = ""

    data = config.data = ConfigDict()
    # CPython's own library, or a file, a folder or a glob; or text that `deepseek-jax prepare` has made shards of: a
    # folder, or several with weights, tokens/web@0.7,tokens/code@0.3
    data.source = "stdlib"
    data.text_key = "text"  # field of a JSONL or parquet row that holds the document
    data.format = "auto"  # text, conversations (rows with "messages"), or what the first row is
    data.chat_template = ""  # of conversations: v2, v3, r1, v31, v32, v4, ...; "" is the one beside the tokenizer
    data.train_on = "answers"  # of conversations: all answers of the assistant, or the last
    data.special_tokens = False  # True: marks spelled out in a text become their ids; False: they are text
    data.add_bos = True  # documents begin with <bos> where the tokenizer_config.json says add_bos_token
    data.tokenizer = "bytes"  # bytes, deepseek (extra: tokenizer), none, or the path of a tokenizer.json or its folder
    data.seq_len = 256  # tokens of a training sequence
    data.fim_rate = 0.0  # share of documents turned to prefix-suffix-middle (V3 section 4.1)
    data.mask_documents = False  # True: attention stays inside a document (V3 pre-trains without)
    data.holdout_rate = 0.02  # share of documents kept for evaluation
    data.workers = 0  # reader processes; 0 reads in threads
    data.cache_dir = ""  # tokenised corpora; "" is the user's cache directory

    loop = config.loop = ConfigDict()  # fields of `train.loop.LoopConfig`
    loop.steps = 1000
    loop.log_every = 10
    loop.eval_every = 250  # steps between evaluations on held-out text
    loop.eval_batches = 8
    loop.eval_redundant = 0  # replicas of busy experts in evaluations (V3 section 3.4.1), a multiple of mesh.expert
    loop.max_skipped = 5  # non-finite steps in a row that stop the run
    loop.routing_delay = 0  # steps by which a batch's experts are chosen ahead (V4's anticipatory routing); 0: none

    batch = config.batch = ConfigDict()  # `train.ramp.BatchRamp`
    batch.size = 8  # sequences per step over all devices, after the ramp
    batch.size_start = 0  # sequences per step at step 0; 0, or more than size: as many as size
    batch.ramp_steps = 0  # steps over which the batch grows linearly

    loss = config.loss = ConfigDict()  # `train.loss.PreTraining`, `train.step.StepConfig`
    loss.chunk = 2048  # tokens whose logits exist at a time
    loss.mtp_weight = 0.3  # lambda of the multi-token-prediction loss (V3 section 4.2)
    loss.mtp_weight_final = 0.1
    loss.mtp_weight_switch = 1_000_000_000  # step from which the final weight holds
    loss.balance_rate = 1e-3  # gamma: step of the router-bias update (V3 section 2.1.2)
    loss.balance_rate_stop = 1_000_000_000  # step from which gamma is 0
    loss.trained = (
        ""  # a name in the paths of the weights that are trained, such as indexer; others are frozen; "": all
    )
    loss.clip_norm = 1.0  # largest global norm of the gradients
    auxiliary = loss.auxiliary = ConfigDict()  # weight of each auxiliary loss that layers report, by its name
    auxiliary.expert_balance = 1e-4  # alpha of the sequence-wise balance loss (V2's alpha_1)
    auxiliary.device_balance = 0.0  # alpha_2: of the loss that balances groups of experts (V2 section 2.2.3)
    auxiliary.communication_balance = 0.0  # alpha_3: of the one that balances what groups are sent

    run = config.run = ConfigDict()  # changes speed and memory, not what is computed; and what a run begins with
    run.init_from = ""  # initial weights: a run's workdir or published weights, whose tokenizer is taken too
    run.anew = ""  # a name in the paths of the weights that run.init_from does not have: initialised at random
    run.remat = "none"  # none, block (keep block inputs only), or dots (keep matmul outputs)
    run.unroll = 1  # layers that one turn of the loop over layers runs: more compile longer and copy less
    run.compilation_cache = ""  # directory of compiled programs; "" is the user's cache directory

    # Low-rank adapters (`layers.lora`), which alone are trained, beside run.init_from.
    lora = config.lora = ConfigDict()
    lora.rank = 0  # r; 0 trains the weights themselves
    lora.alpha = 16.0  # adapters count alpha / rank times
    lora.targets = "all-linear"  # names as PEFT has them, q_proj,v_proj; all-linear: all that take some
    lora.init_from = ""  # directory of adapters that PEFT has written, to begin with

    # Which implementation computes each operation of `deepseek_jax.kernels.TABLE`.
    config.kernels = ConfigDict(dict.fromkeys(TABLE, "xla"))

    fp8 = config.fp8 = ConfigDict()  # `precision.policy`, for precision fp8
    fp8.weights = "float32"  # that are quantised, and their gradients (V3); bfloat16: half the memory traffic
    fp8.scale = "fp32"  # fp32, or ue8m0: powers of two (V3.1)
    fp8.gradient_block = "1x128"  # of activation gradients; 128x128 is the choice that V3 found to diverge

    schedule = config.schedule = ConfigDict()  # of the learning rate
    schedule.peak_rate = 3e-4  # after warm-up
    schedule.warmup_steps = 100  # linear from 0
    schedule.constant_steps = 0  # at peak_rate
    schedule.cosine_steps = 0  # from peak_rate to tail_rate
    schedule.tail_rate = 3e-5
    schedule.tail_steps = 0  # at tail_rate; final_rate from there on
    schedule.final_rate = 3e-5

    optimizer = config.optimizer = ConfigDict()
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.moments_dtype = "float32"  # V3 keeps bfloat16 (section 3.3.3)
    optimizer.method = "adamw"  # muon: matrices by Muon, and by AdamW embedding, head, gains, biases, adapters (V4)
    optimizer.momentum = 0.95  # Muon's
    optimizer.rms = 0.18  # root mean square of Muon's updates, relative to the learning rate

    rl = config.rl = ConfigDict()  # reinforcement learning (deepseek-jax rl); `loop` and `checkpoint` count its steps
    rl.problems = "sums"  # sums:DIGITS, needle:LENGTH, rg:NAME (reasoning-gym), or JSONL files with prompt and answer
    rl.holdout_rate = 0.1  # share of problems kept for evaluation
    rl.teacher = ""  # a run's workdir or published weights that judge each token, in place of rewards (distillation)
    rl.thinking = False  # whether prompts open a thought, in chat templates that can (`data.chat_template`)
    rl.questions = 16  # problems per step
    rl.answers = 8  # to each of them (G)
    rl.updates = 2  # of the weights per step, each on its share of the answers
    rl.longest_prompt = 256  # tokens
    rl.longest_answer = 256  # tokens, the end mark included
    rl.temperature = 1.0  # at which answers are drawn
    rl.top_p = 1.0  # mass of the nucleus that they are drawn from, and over which they are learnt from (V3.2)
    rl.keep_routing = False  # True: answers are learnt from over the experts that they were drawn with (V3.2)
    rl.rollout = "batch"  # one program until all answers have ended; engine: a row that has ends for the next prompt
    rl.rows_at_once = 0  # answers that are drawn, and measured, at a time, as memory allows; 0: all of a step
    rl.refresh_every = 0  # steps after which the policy becomes the reference of the KL divergence; 0: never
    rl.eval_problems = 512  # held-out problems of an evaluation
    rl.verifiers = 2  # processes for answers that take long to verify
    rl.verify_s = 10.0  # seconds that one of these may take; a program that is tested, in each test
    rewards = rl.rewards = ConfigDict()  # weight of each reward (`deepseek_jax.rl.rewards`)
    rewards.accuracy = 1.0
    rewards.format = 0.0
    rewards.language = 0.0
    rewards.length = 0.0
    rewards.overlong = 0.0
    grpo = rl.grpo = ConfigDict()  # `rl.grpo.GRPO`; as V3.2 has it, where that is said
    grpo.advantage = "mean"  # r - mean r; std: divided by the standard deviation (DeepSeekMath, R1)
    grpo.aggregation = "token"  # token, sequence (DeepSeekMath, R1) or constant (Dr. GRPO): what a mean is over
    grpo.ratio = "token"  # sequence: GSPO
    grpo.clip_low = 0.2
    grpo.clip_high = 0.28  # as DAPO has it
    grpo.log_ratio_bound = 20.0  # nats
    grpo.beta = 0.0  # weight of the KL divergence to the reference; 0.0 keeps none
    grpo.unbiased_kl = True  # V3.2 eq. 7; False: k3 alone
    grpo.off_policy_bound = 0.0  # delta of V3.2's mask, in nats per token; 0.0: no mask
    grpo.importance_cap = 2.0  # of the weights pi_old / pi_sampled; 0.0: none

    sample = config.sample = ConfigDict()  # answers kept for fine-tuning (deepseek-jax sample; R1 section 2.3.3)
    sample.problems = 1024  # that are asked
    sample.answers = 4  # drawn to each
    sample.most = 1  # kept of each
    sample.choose = "shortest"  # which of those that may be kept: the shortest, or the first
    sample.longest = 0  # tokens of a kept answer; 0: any that ends within rl.longest_answer
    least = sample.least = ConfigDict()  # least value of a reward of a kept answer; 0.0: any
    least.accuracy = 1.0
    least.format = 1.0
    least.language = 0.9

    config.r1 = ConfigDict()  # of each stage of R1 (deepseek-jax r1), the keys that it changes

    ema = config.ema = ConfigDict()  # moving average of the weights in the hosts' memory (V3 section 3.2.3)
    ema.decay = 0.0  # per step, such as 0.999; 0.0 keeps none
    ema.evaluate = False  # True: held-out text is judged with the average in place of the weights

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every = 250  # steps; the last step is always saved
    checkpoint.keep = 3
    # folder of each host's own disk for copies of what the host has written of the last two checkpoints, from which a
    # run that starts again reads; for a workdir in a bucket, and with space for three: one is being written. "": none
    checkpoint.local = ""

    # Processes that are gone, stuck or slow (`parallel.peers`, `train.watchdog`); an end of this kind has exit code 75.
    watch = config.watch = ConfigDict()
    watch.heartbeat_s = 30.0  # without a sign of life for so long, a process counts as lost
    watch.alone = False  # True: what follows also holds for a run of one process
    watch.step_s = 120.0  # a run ends after so long without progress, or 10 steps' time if that is more; 0.0: never
    watch.long_s = 3600.0  # the same while it compiles, restores, evaluates, saves or opens its text; 0.0: never
    watch.stop_s = 120.0  # from a signal to the beginning of the save, else the run ends without; 0.0: any time
    watch.slow = 1.3  # times the median, from which a process is named as slow (`train.hosts`; not by rl); 0.0: none

    wandb = config.wandb = ConfigDict()  # `train.wandb_run` (extra: wandb)
    wandb.project = ""  # of Weights & Biases, which then has the charts as well; "": none

    profile = config.profile = ConfigDict()  # `train.profiles`
    profile.port = 0  # of process 0's profiling server, process K's is K above; 0: no server
    profile.first = 1  # the first of the steps that are profiled into the workdir
    profile.steps = 0  # how many they are
    profile.process = 0  # which process is profiled; -1: all
    return config
