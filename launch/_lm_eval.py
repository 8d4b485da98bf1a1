"""A model as lm-eval asks it: in this process, or a server over HTTP.

Both are asked the same: log-probabilities of texts, and their continuations up to a stop string. Every text begins with
the begin mark if the model's tokenizer asks for one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.launch._http import ask
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.offline import outputs
from deepseek_jax.serve.outputs import Logprob, Output
from deepseek_jax.serve.reply import PLAIN, Reply
from deepseek_jax.serve.sampling import Sampling

Scored = tuple[float, bool]  # a text's log-probability, and whether each of its tokens is the likeliest


class InProcess(TemplateLM):
    """An engine of this process; `end_ids` end an answer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, end_ids: Sequence[int]):
        super().__init__()
        self.engine, self.words, self.end_ids = engine, tokenizer, tuple(end_ids)
        self.begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.begin[0] if self.begin else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, after the begin mark unless that is refused."""
        return [*(self.begin if add_special_tokens is not False else []), *self.words.encode(string).tolist()]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        sampling, longest = Sampling(1, logprobs=1, prompt_logprobs=True), self.engine.most_positions - 1
        if too_long := max((len(text) for *_, text in requests if len(text) >= longest), default=0):
            raise UserError(f"a text of {too_long} tokens to be scored: expected fewer than {longest}.")
        asked = [([*context, *text][-longest:], sampling) for _, context, text in requests]
        found: list[Scored] = [(0.0, True)] * len(asked)
        for number, output in self._outputs(asked, disable_tqdm):
            text = requests[number][2]
            scores = output.prompt_logprobs[len(output.prompt_logprobs) - len(text) :]
            found[number] = _sum(text, scores)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, whose parts are as long as the model allows."""
        texts = [self.words.encode(request.args[0]).tolist() for request in requests]
        return _rolling(self, texts, self.engine.most_positions - 2, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each text, up to a stop string.

        A prompt that leaves too few positions loses its beginning, down to half of the model's positions.
        """
        asked, replies, most = [], [], self.engine.most_positions
        for request in requests:
            context, given = request.args
            options = normalize_gen_kwargs(given)
            drawing = {name: options[name] for name in ("temperature", "top_p", "top_k", "min_p") if name in options}
            prompt = self.tok_encode(context)
            n_new = min(options["max_gen_toks"], max(most // 2, most - len(prompt)))
            asked.append((prompt[-(most - n_new) :], Sampling(n_new, stop_ids=self.end_ids, **drawing)))
            replies.append(Reply(PLAIN, self.words, stop=options["until"]))
        for number, output in self._outputs(asked, disable_tqdm):
            replies[number].push([token for token in output.ids if token not in self.end_ids])
            if replies[number].has_stopped:
                self.engine.cancel(output.request)
        for reply in replies:
            reply.finish()
        return [reply.message()["content"] for reply in replies]

    def _outputs(self, asked: Sequence[tuple[list[int], Sampling]], is_silent: bool) -> Iterator[tuple[int, Output]]:
        """Yields what the engine says to each, with its number."""
        with tqdm(total=len(asked), desc="Asking the model", disable=is_silent) as bar:
            for number, output in outputs(self.engine, asked):
                yield number, output
                bar.update(output.request.has_ended)


def _sum(ids: Sequence[int], scores: Sequence[Logprob | None]) -> Scored:
    """The sum over a text, of which each token has a score, since something stands before it."""
    pairs = [(token, score) for token, score in zip(ids, scores, strict=True) if score]
    return sum(score.logprob for _, score in pairs), all(score.top[0][0] == token for token, score in pairs)


def _rolling(judge: Any, texts: Sequence[list[int]], longest: int, is_silent: bool) -> list[float]:
    """The log-probability of each text, in windows of `longest` tokens; the first token follows the prefix token."""
    windows, owners = [], []
    for number, ids in enumerate(texts):
        for pair in get_rolling_token_windows(ids, judge.prefix_token_id, longest, context_len=1):
            windows.append((None, *make_disjoint_window(pair)))
            owners.append(number)
    found = [0.0] * len(texts)
    for owner, (score, _) in zip(owners, judge._loglikelihood_tokens(windows, disable_tqdm=is_silent), strict=True):
        found[owner] += score
    return found


def over_http(url: str, key: str, n_concurrent: int) -> Any:
    """Returns lm-eval's own client for a server, which knows the longest sequence and the begin mark of its model."""
    asked = ask(f"{url}/tokenize", key, {"prompt": "", "add_special_tokens": True})
    begin = asked["tokens"]

    class Client(LocalCompletionsAPI):
        def tok_encode(self, string: Any, left_truncate_len: int | None = None, **options: Any) -> Any:
            if left_truncate_len:
                left_truncate_len -= len(begin)
            ids = super().tok_encode(string, left_truncate_len=left_truncate_len, **options)
            return [*begin, *ids] if isinstance(string, str) else [[*begin, *one] for one in ids]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [super(Client, self).tok_encode(request.args[0]) for request in requests]
            return _rolling(self, texts, self.max_length - 1, disable_tqdm)

    return Client(
        base_url=f"{url}/v1/completions",
        model=ask(f"{url}/v1/models", key)["data"][0]["id"],
        tokenizer_backend="remote",
        max_length=asked["max_model_len"],
        num_concurrent=n_concurrent,
        auth_token=key or None,
        header={"Authorization": f"Bearer {key}"} if key else {},
    )
