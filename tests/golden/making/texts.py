# ruff: noqa: RUF001  the look-alike characters are the point
"""The texts that the real model and its tokenizer are measured on. Written for this purpose."""

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A prompt given as plain text, or as chat messages rendered with a generation prompt."""

    name: str
    text: str = ""
    messages: tuple[Message, ...] = ()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


LONG_TEXT = (
    "The lighthouse at the end of the northern pier was built in 1874, after three ships had been lost on the same "
    "rock in one winter. Its first keeper, a retired schoolteacher, wrote down everything she saw: the weather, the "
    "names of the boats, the birds that struck the glass at night. Her notebooks fill two shelves in the town library, "
    "and for a long time nobody read them. Then, in the dry summer of 1976, a young engineer who had come to repair "
    "the fog signal asked the librarian for something to read in the evenings. He took the first notebook home, and "
    "then the second, and by September he had read all forty-one of them.\n\n"
    "What he found was not only a diary. The keeper had measured the height of the tide every day at noon, with a "
    "brass rule screwed to the foot of the tower, for thirty-three years without missing a day. She had noted the "
    "direction of the wind beside each number, and the moon, and whether the fishing had been good. The engineer "
    "copied the numbers onto squared paper. When he put the sheets side by side on the floor of his room, the line "
    "rose and fell like breathing, and underneath the breathing there was something slower: the sea was coming up, "
    "by the thickness of a coin each year. He wrote a letter to the university. The professor who answered it asked "
    "first whether the rule was still there. It was, under a coat of green paint, and it had not moved. Today the "
    "notebooks are kept in a dry room at the right temperature, and scientists come from far away to see them. "
    "The most surprising thing about the notebooks is"
)

CODE_TEXT = '''def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number."""
    if n < 2:
        return n
    a, b = 0, 1
    for _ in range(n - 1):
'''

PROMPTS: tuple[Prompt, ...] = (
    Prompt("single_word", "Hello"),
    Prompt("prose", "It was a cold morning in the mountains, and the old shepherd"),
    Prompt("fact", "The capital of France is"),
    Prompt("python", CODE_TEXT),
    Prompt("json", '{"name": "Alice", "age": 31, "tags": ["reader", "runner"], "address": {"street":'),
    Prompt("c_loop", "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++) {\n\t\t"),
    Prompt("arithmetic", "12 + 7 = 19\n25 + 14 = 39\n108 + 31 = 139\n64 + 27 ="),
    Prompt("counting", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"),
    Prompt("digits", "The number pi begins 3.14159265358979 and the year 2024 has 366 days, so"),
    Prompt("french", "Il était une fois, dans un petit village près de la mer,"),
    Prompt("german", "Die Straße führte über die Brücke, und hinter dem Fluss"),
    Prompt("chinese_japanese", "今天的天气很好。東京は日本の首都です。"),
    Prompt("russian", "Меня зовут Анна. Я живу в"),
    Prompt("emoji", "I love pizza 🍕🍕 and ice cream 🍦! My favourite animals are 🐶, 🐱 and"),
    Prompt("list", "Things to pack for a week in the mountains:\n\n- tent\n- warm jacket\n- a good map\n-"),
    Prompt("markdown", "# Photosynthesis\n\nPhotosynthesis is the process by which plants\n\n## Steps\n\n1."),
    Prompt("long", LONG_TEXT),
    Prompt("chat_question", messages=(_user("What is gravity? Answer in two sentences."),)),
    Prompt(
        "chat_system",
        messages=(_system("You are a pirate. Talk like one."), _user("How do I boil an egg?")),
    ),
    Prompt(
        "chat_turns",
        messages=(
            _user("Name a fruit that is red."),
            _assistant("An apple."),
            _user("Now name 3 that are yellow, as a list."),
        ),
    ),
)

TOP_LOGPROBS_PROMPT = "prose"

TOKENIZER_CASES: tuple[str, ...] = (
    "",
    " ",
    "     ",
    "Hello, world!",
    " Hello",
    "1234567890",
    "In 2024, 365.25 days cost $1,299.99 (−12%).",
    "v1.2.3-rc4+build567",
    "x2y3z 4a5b6 007",
    "٣٤٥ ½ ² Ⅷ ４２",
    "naïve café, coöperate, jalapeño",
    "e\u0301 is not é",
    "Привет, мир! Как дела?",
    "你好，世界。",
    "日本語のテキストとカタカナ",
    "안녕하세요 세계",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया",
    "🙂 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "control \x04\x06 bytes",
    "tab\tnewline\ncarriage\r\nreturn",
    "line one\n\n\n    indented by four\n\t\ttabbed   \n",
    "non\u00a0breaking\u2003em\u200bzero\u3000wide",
    "I'm you're they'll we've he'd it's DON'T can’t",
    "<|im_start|>user\nHi there<|im_end|>\n",
    "<|endoftext|><|im_end|> text <|im_start|>no space<|im_end|>",
    "<repo_name>quire<file_sep>main.py\n<jupyter_code>1+1<empty_output>",
    "<|im_start> <|not_special|> < |im_end|>",
    "https://example.org/a_b?q=1&r=%20#frag",
)

CHATS: tuple[tuple[Message, ...], ...] = (
    (_user("Hello! Who are you?"),),
    (_system("Answer in one word."), _user("What colour is the sky at noon?")),
    (
        _user("Compute 17 * 3."),
        _assistant("17 * 3 = 51"),
        _user("  And in German? \n"),
        _assistant("Einundfünfzig 🙂"),
        _user("Danke"),
    ),
)
