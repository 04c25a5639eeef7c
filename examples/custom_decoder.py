"""Speculative decoding in a decoding loop of one's own: the drafter, one verify pass, the cache.

``sssd.hf.generate`` does all this and more (batches, sampling, stopping, streaming). This is the bare method
for one greedy request, to copy from when your loop is not transformers' ``generate``.

    python examples/custom_decoder.py
"""

import torch
from transformers import DynamicCache

import sssd
from sssd.hf import cache_argument, smollm2

PROMPT = """Write this function again and rename it to surface:

def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return width * height
"""


@torch.no_grad()
def decode(model, prompt_ids: list[int], end_id: int, max_new_tokens: int, drafter: sssd.Drafter):
    """Decodes greedily; returns the new tokens and the number of verify passes."""
    cache = DynamicCache()  # without config: sliding layers would throw away what a rejected draft pushed out
    states = {cache_argument(model): cache}  # transformers renamed it in 5.24
    logits = model(torch.tensor([prompt_ids]), logits_to_keep=1, **states).logits
    output = [int(logits[0, -1].argmax())]
    steps, block = 0, sssd.PassBlock()
    with drafter.begin(prompt_ids) as sequence:
        sequence.extend(output)
        while output[-1] != end_id and len(output) < max_new_tokens:
            trees = drafter.draft_batch([sequence], max_nodes=16)

            # One pass over the last token, which is not in the cache yet, and all nodes of the tree.
            past = cache.get_seq_length()
            block.fill(trees, roots=output[-1:], positions=[past], mask=True)
            ids, positions, in_tree = map(torch.from_numpy, (block.ids, block.positions, block.mask[0]))
            mask = torch.cat([torch.ones(len(in_tree), past, dtype=torch.bool), in_tree], dim=1)
            logits = model(ids, attention_mask=mask[None, None], position_ids=positions, **states).logits
            steps += 1

            # The path that the model itself would have taken, and its next token.
            kept, tokens, _ = block.accept(logits.argmax(-1).numpy())

            # Keep the path's keys and values, wherever it lay in the tree, and cut the rest off.
            kept = past + torch.from_numpy(kept)
            for layer in cache.layers:
                layer.keys[:, :, past : past + len(kept)] = layer.keys[:, :, kept]
                layer.values[:, :, past : past + len(kept)] = layer.values[:, :, kept]
            cache.crop(-(len(in_tree) - len(kept)))

            accepted = tokens.tolist()
            if end_id in accepted:
                accepted = accepted[: accepted.index(end_id) + 1]
            output += accepted[: max_new_tokens - len(output)]
            sequence.extend(accepted)
    return output, steps


def main() -> None:
    model, tokenizer = smollm2.load()
    messages = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt_ids = inputs["input_ids"][0].tolist()
    drafter = sssd.Drafter(vocab_size=len(tokenizer), end_token_ids=[tokenizer.eos_token_id])
    output, steps = decode(model, prompt_ids, tokenizer.eos_token_id, 80, drafter)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=80)[0, len(prompt_ids) :].tolist()
    print(tokenizer.decode(output))
    equal = output == expected
    print(f"{len(output)} tokens in {steps} verify passes; equal to model.generate: {equal}")


if __name__ == "__main__":
    main()
