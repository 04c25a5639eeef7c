"""Prompts for SmolLM2: edits and questions whose answers repeat the prompt, and free text that does not."""

_FUNCTION = """def area(width, height):
    if width < 0:
        raise ValueError('width')
    return width * height
"""
_NOTE = (
    "The ferry leaves Port Alma at seven, stops at Gull Island at eight and reaches Sandwick at nine thirty."
)
_LIST = "apples, pears, plums, cherries, apricots, figs, grapes"

PROMPTS = [
    f"Rename the function to surface and write it again:\n\n{_FUNCTION}",
    f"Add a check of the height to this function and write it again:\n\n{_FUNCTION}",
    f"Write this function again with type hints:\n\n{_FUNCTION}",
    f"Explain this function line by line:\n\n{_FUNCTION}",
    f"Write three tests for this function:\n\n{_FUNCTION}",
    f"{_NOTE}\n\nWhen does the ferry reach Sandwick? Answer with the whole sentence.",
    f"{_NOTE}\n\nRepeat this text word by word.",
    f"{_NOTE}\n\nMake a timetable of the ferry.",
    f"Translate into French: {_NOTE}",
    f"Shorten this text: {_NOTE}",
    f"Sort this list by the alphabet: {_LIST}",
    f"Write this list with one item a line: {_LIST}",
    f"Repeat this list three times: {_LIST}",
    f"Which of these fruits have stones? {_LIST}",
    "Write the numbers from 1 to 30, separated by commas.",
    "Write the alphabet, each letter followed by a word that begins with it.",
    "Write a loop in Python that prints the squares of the numbers from 1 to 10.",
    "Write a SQL query that counts the orders of every customer.",
    "Write a small HTML page with a heading and a list of three colors.",
    "Write a haiku about rain.",
    "What is the difference between a comet and an asteroid?",
    "How do I cook rice without a rice cooker?",
    "Give me five ideas for a rainy Sunday.",
    "Who was Ada Lovelace?",
    "Why is the sky blue?",
    "Write a letter to a neighbour who plays loud music at night.",
    "Explain how a bicycle stays upright.",
    "What should I pack for a week in the mountains?",
    "Tell me a story about a fox and a lighthouse.",
    "Summarize the rules of chess in five sentences.",
    "Erkläre in zwei Sätzen, was ein Compiler ist.",
    "Write the multiplication table of seven.",
]
