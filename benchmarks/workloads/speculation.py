"""Two workloads for speculative decoding: answers that copy from their prompts, and answers that do not.

64 chats each, eight tasks with eight texts, in an order that spreads both: a batch of n is the first n of them, and
the first eight have eight tasks and eight texts. Names and numbers in the texts are those of the repetition, so that no
two repetitions ask the same.

| | what | how much is copied |
|---|---|---|
| copy | repeat, correct, change a word, list, quote: 110 to 140 prompt tokens, 64 new | most of the answer |
| open | explain, advise, invent: 35 to 55 prompt tokens, 96 new | little: a phrase, a name |

SmolLM2-135M-Instruct is small: it repeats a text well and corrects it badly. What counts is that the answers are what
the model says; how good they are does not matter here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MODEL = "SmolLM2-135M-Instruct"
NUM_CHATS = 64
SEED = 20251125

NAMES = ("Marta", "Oskar", "Leila", "Tomas", "Ingrid", "Samir", "Paula", "Victor", "Hanna", "Diego", "Yuki", "Farid")
TOWNS = ("Aalborg", "Ghent", "Porto", "Lviv", "Trieste", "Bergen", "Kaunas", "Graz", "Cork", "Murcia", "Tartu", "Bari")

TEXTS = (
    "The night ferry from {town} was late again. {name} had packed {few} boxes of glass lamps, each wrapped in two "
    "layers of paper, and now they stood in the rain. The harbour office promised a reply by {hour} o'clock, but "
    "nobody picked up the telephone. In the end a driver with an empty van took all of them to the warehouse.",
    "The school in {town} keeps {few} hens behind the kitchen. {name} feeds them at {hour} o'clock, before the "
    "first lesson, and writes the number of eggs on a board. In May there were {many} eggs in a single week. The "
    "cook makes pancakes of them, and the children of the third class sell the rest at the gate on market days.",
    "Shopping for the school trip: {few} loaves of bread, {many} apples, a jar of honey, six bottles of water, a "
    "first aid kit, two rolls of tape, a map of {town}, paper cups, and a whistle for {name}. The bus leaves at "
    "{hour} o'clock. Whoever comes late must take the tram and pay for the ticket alone.",
    "The old clock above the station of {town} stopped last Tuesday at {hour} o'clock. {name} climbed {many} steps "
    "to look at it. A pigeon had built a nest between the wheels, and {few} eggs lay in it. The town decided to "
    "wait until the young birds have flown, and to put a paper clock in the window of the ticket office until then.",
    "Minutes of the garden club, {town}. Present: {name} and {few} members. The pump is broken and will cost {many} "
    "euros. The club decided to buy a used one. The old plum tree stays, the hedge will be cut in October. The next "
    "meeting begins at {hour} o'clock in the tool shed; bring a chair and a lamp.",
    "The lake north of {town} freezes every winter, but the ice is thick enough for only {few} weeks. {name} "
    "measures it each morning with a drill and a ruler. Below {many} millimetres nobody may walk on it. Last year "
    "the warm wind came early, and by {hour} o'clock on the first of March the ice had broken into long grey "
    "plates.",
    "Dear {name}, thank you for your letter from {town}. The {few} chairs arrived on Monday, and one of them has a "
    "loose leg. I have kept the bill for {many} francs. Could your carpenter come on Friday at {hour} o'clock? The "
    "gate will be open. Please tell him to use the back door, because the front steps have just been painted.",
    "After the storm {name} walked along the beach of {town} and counted what the sea had left there: {few} wooden "
    "crates, a red boot, a broken oar, and {many} green bottles without a letter in any of them. The fishermen came "
    "at {hour} o'clock with a cart, took the crates, and left the bottles for the children.",
)

TASKS = (
    "Repeat the following text word for word.\n\n{text}",
    "Repeat the following text. Write Robert instead of {name}.\n\n{text}",
    "Correct the spelling mistakes in the following text. Answer with the whole corrected text only.\n\n{text}",
    "Repeat the following text, but replace {town} by London.\n\n{text}",
    "Repeat the following text as a list, one sentence in each line.\n\n{text}",
    "Repeat the following text, and put it in quotation marks.\n\n{text}",
    "Repeat the following text twice.\n\n{text}",
    "Add a last sentence to the following text, and repeat the rest of it word for word.\n\n{text}",
)

TOPICS = (
    "how bread rises",
    "why ships float",
    "keeping bees in {town}",
    "learning the violin at the age of {many}",
    "the smell of rain",
    "moving to {town} with {few} cats",
    "how {name} lost a bet",
    "what a lighthouse keeper does all day",
)

QUESTIONS = (
    "Tell me about {topic}.",
    "Write a short story about {topic}.",
    "A friend asks you about {topic}. What do you answer?",
    "Give a curious child an explanation: {topic}.",
    "Write the beginning of a newspaper article about {topic}.",
    "What would {name} from {town} say about {topic}?",
    "Argue for and against: {topic}.",
    "Write a letter in which the subject is {topic}.",
)


@dataclass(frozen=True)
class ChatWorkload:
    """Requests of one user message each.

    Attributes:
        name: "copy" or "open".
        frames: what is asked, with a place for a subject.
        subjects: what it is asked of.
        place: the name of that place.
        output_len: tokens of each answer, exactly.
    """

    name: str
    frames: tuple[str, ...]
    subjects: tuple[str, ...]
    place: str
    output_len: int

    def messages(self, repetition: int) -> list[str]:
        """The `NUM_CHATS` user messages; each repetition has names and numbers of its own."""
        draw = random.Random(f"{SEED}/{self.name}/{repetition}")
        found = []
        for number in range(NUM_CHATS):
            # Each task meets each text once.
            frame = self.frames[number % len(self.frames)]
            subject = self.subjects[(number + number // len(self.frames)) % len(self.subjects)]
            facts = {
                "name": draw.choice(NAMES),
                "town": draw.choice(TOWNS),
                "few": draw.randint(3, 9),
                "many": draw.randint(12, 95),
                "hour": draw.randint(4, 11),
            }
            found.append(frame.format(**facts, **{self.place: subject.format(**facts)}))
        return found


WORKLOADS = {
    "copy": ChatWorkload("copy", TASKS, TEXTS, "text", 64),
    "open": ChatWorkload("open", QUESTIONS, TOPICS, "topic", 96),
}
