"""What `quire bench serve` sends: requests with seeded prompts, and when each is sent."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Prompt = str | list[int]
MakePrompt = Callable[[random.Random, int], Prompt]  # a prompt of so many tokens

# Short and frequent, so that nearly each is one token of a BPE tokenizer.
_TEXT = (
    "the of and to in is was for on that with by at from his her as are be this have or had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know get through back "
    "much before go good new write our used me man too any day same right look think also around another came come "
    "work three word must because does part even place well such here take why things help put years different away "
    "again off went old number great tell men say small every found still between name should home big give air line "
    "set own under read last never us left end along while might next sound below saw something thought both few "
    "those always looked show large often together asked house world going want school important until form food keep "
    "children feet land side"
)
WORDS = tuple(dict.fromkeys(_TEXT.split()))


@dataclass(frozen=True)
class ServeRequest:
    """One request.

    Attributes:
        prompt: text, or token ids.
        output_len: tokens to generate.
    """

    prompt: Prompt
    output_len: int


def text_prompt(generator: random.Random, num_tokens: int) -> str:
    """So many words. With most tokenizers about so many tokens; what counts is what the server says."""
    return " ".join(generator.choices(WORDS, k=num_tokens))


def ids_prompt(vocab_size: int, first_id: int) -> MakePrompt:
    """Makes prompts of token ids, uniform from `first_id` to the end of the vocabulary."""

    def make(generator: random.Random, num_tokens: int) -> list[int]:
        return generator.choices(range(first_id, vocab_size), k=num_tokens)

    return make


def join(prefix: Prompt, suffix: Prompt) -> Prompt:
    """One prompt of two of the same kind."""
    if isinstance(prefix, str) and isinstance(suffix, str):
        return f"{prefix} {suffix}"
    assert isinstance(prefix, list) and isinstance(suffix, list)
    return prefix + suffix


@dataclass(frozen=True)
class ShareGpt:
    """Lengths as in ShareGPT: log-normal, cut to what `vllm bench serve` keeps of it.

    The mean prompt has about 220 tokens, the mean answer about 180.
    """

    max_total_len: int = 2048

    def requests(self, count: int, seed: str, make: MakePrompt) -> list[ServeRequest]:
        """`count` requests, always the same for a seed."""
        generator = random.Random(seed)
        found: list[ServeRequest] = []
        while len(found) < count:
            prompt_len = round(generator.lognormvariate(math.log(150), 0.95))
            output_len = round(generator.lognormvariate(math.log(130), 0.8))
            if 4 <= prompt_len <= 1024 and 4 <= output_len <= 1024 and prompt_len + output_len <= self.max_total_len:
                found.append(ServeRequest(make(generator, prompt_len), output_len))
        return found


@dataclass(frozen=True)
class RandomLengths:
    """Prompts and answers of about one length, uniform from `len * (1 - range_ratio)` to `len * (1 + range_ratio)`."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0

    def requests(self, count: int, seed: str, make: MakePrompt) -> list[ServeRequest]:
        """`count` requests, always the same for a seed."""
        generator = random.Random(seed)
        shapes = [(self._draw(generator, self.input_len), self._draw(generator, self.output_len)) for _ in range(count)]
        return [ServeRequest(make(generator, prompt_len), output_len) for prompt_len, output_len in shapes]

    def _draw(self, generator: random.Random, length: int) -> int:
        low, high = math.floor(length * (1 - self.range_ratio)), math.ceil(length * (1 + self.range_ratio))
        return generator.randint(max(1, low), high)


@dataclass(frozen=True)
class PrefixRepetition:
    """Few prefixes, each shared by many requests that differ after it, in random order."""

    prefix_len: int
    suffix_len: int
    num_prefixes: int
    output_len: int

    def requests(self, count: int, seed: str, make: MakePrompt) -> list[ServeRequest]:
        """`count` requests, always the same for a seed. Each prefix comes equally often, give or take one."""
        generator = random.Random(seed)
        prefixes = [make(generator, self.prefix_len) for _ in range(self.num_prefixes)]
        chosen = list(itertools.islice(itertools.cycle(prefixes), count))
        generator.shuffle(chosen)
        return [ServeRequest(join(prefix, make(generator, self.suffix_len)), self.output_len) for prefix in chosen]


Dataset = ShareGpt | RandomLengths | PrefixRepetition


def arrival_times(count: int, rate: float, burstiness: float, seed: str) -> list[float]:
    """When each of `count` requests is sent, in seconds after the start.

    Args:
        rate: requests per second; inf = all at once.
        burstiness: shape of the gamma distribution of the gaps. 1 is a Poisson process, less comes in bursts, more is
            more even, inf is a fixed gap.

    Returns:
        Times that rise to exactly `count / rate`, so that the rate of a run does not depend on its seed.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(index + 1) / rate for index in range(count)]
    generator = random.Random(seed)
    gaps = [generator.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    times = list(itertools.accumulate(gaps))
    return [time * (count / rate) / times[-1] for time in times]
