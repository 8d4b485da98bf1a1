"""Shards made on Apache Beam, for those who have a runner: `workers` without it does the same.

Beam needs other versions of some packages than training does, so it belongs in an environment of its own:

    pip install deepseek_jax apache-beam
"""

from collections.abc import Iterator, Sequence

from deepseek_jax.data.prepared.plan import Plan
from deepseek_jax.data.prepared.shards import clear_partial, make_shard
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.data.watch import unwatched
from deepseek_jax.errors import UserError


def make_shards_on_beam(plan: Plan, numbers: Sequence[int], options: Sequence[str]) -> None:
    """Makes these shards on the runner that `options` name (`--runner=...`), and waits until all are there.

    The runner's machines need the corpus, the tokenizer and the plan's folder under the same paths. Raises UserError
    if Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "--beam needs the package apache-beam, which is not installed. Run, in an environment of its own: "
            "pip install deepseek_jax apache-beam. Or leave --beam out: processes of this machine do the same."
        ) from error

    class MakeShard(beam.DoFn):
        """Shard numbers in, the same numbers out when they are complete."""

        def setup(self) -> None:
            self.tokenizer = open_tokenizer(plan.tokenizer)
            clear_partial(plan)

        def process(self, number: int) -> Iterator[int]:
            with unwatched("", 0) as counter:
                make_shard(plan, number, self.tokenizer, counter)
            yield number

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        spread = pipeline | beam.Create(list(numbers)) | beam.Reshuffle()
        _ = spread | beam.ParDo(MakeShard())
