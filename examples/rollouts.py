"""Rollouts of a policy that is trained: groups of samples of one prompt, epoch after epoch, by hand.

The policy is a table with a version, so that it runs anywhere. What a trainer takes over: a group's samples
learn from one another while they run, the next epoch begins with what they said, and texts of old versions
are forgotten.
"""

import random

import numpy as np

from sssd import Drafter
from sssd.rollout import Rollouts

VOCABULARY, SAMPLES, TOKENS, EPOCHS = 500, 4, 120, 3


class Policy:
    """Samples by the prompt and the place in the text; each version says some things otherwise."""

    def __init__(self, version):
        self.version = version

    def next(self, text, sample):
        choose = random.Random(VOCABULARY * len(text) + text[0])
        ways = [choose.randrange(VOCABULARY) for _ in range(8)]
        is_certain, changes_at = choose.random() < 0.9, choose.randrange(20)
        version = self.version if changes_at <= self.version else 0
        # where it is not certain, each sample goes its own way
        return ways[version] if is_certain else ways[4 + sample % 4]


def verify(policy, text, sample, tree):
    """What a pass over a tree gives: the tokens that the policy samples along it, the last not drafted."""
    produced, node = [], -1
    nodes = list(zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True))
    while node is not None:
        produced.append(policy.next([*text, *produced], sample))
        node = nodes.index((node, produced[-1])) if (node, produced[-1]) in nodes else None
    return produced


def sample_group(rollouts, policy, group, prompt):
    """All samples of a prompt side by side; how many passes they took."""
    texts = {f"{group} sample {number}": [*prompt] for number in range(SAMPLES)}
    produced = {}
    for number, (name, text) in enumerate(texts.items()):
        rollouts.begin(name, prompt, group=group)
        produced[name] = [policy.next(text, number)]
    passes = 0
    while texts:
        names = list(texts)
        for name in names:
            texts[name] += produced[name]
        new = [produced[name] for name in names]
        batch = rollouts.step(names, np.concatenate(new), np.cumsum([0, *map(len, new)]), 16)
        for place, name in enumerate(names):
            if len(texts[name]) >= len(prompt) + TOKENS:
                rollouts.finish(name)
                del texts[name]
                continue
            passes += 1
            produced[name] = verify(policy, texts[name], int(name.rpartition(" ")[2]), batch[place])
    return passes


def main():
    random.seed(0)
    prompts = {f"prompt {number}": [random.randrange(VOCABULARY) for _ in range(20)] for number in range(5)}
    rollouts = Rollouts(Drafter(vocab_size=VOCABULARY), keep_policies=2)
    for epoch in range(EPOCHS):
        rollouts.policy = epoch
        policy = Policy(epoch)
        passes = sum(sample_group(rollouts, policy, *prompt) for prompt in prompts.items())
        per_step = len(prompts) * SAMPLES * TOKENS / passes
        print(f"epoch {epoch}: {per_step:.2f} tokens a request and pass")
    return per_step


if __name__ == "__main__":
    main()
