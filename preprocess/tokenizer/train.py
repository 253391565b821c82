"""Trains the embedded tokenizer: `python -m preprocess.tokenizer.train` rewrites its two files.

A byte-level BPE: any text survives encoding and decoding, there is no unknown token. It learns from
the texts of procedural scenes and from the English below; it serves samples, tests and examples,
not models. The same sources give the same bytes, so a change here is a change of every token id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from preprocess.synthetic import plan_scene

VOCAB_SIZE = 2944
"""23 * 128, the largest multiple of 128 that the words below reach (they give 3,001 tokens)."""
END = "<|endoftext|>"
"""The only special token: begins, ends and pads."""

NUM_SCENES = 400
"""Scenes whose texts are read: all their words occur many times by then."""
SCENE_SEED = 0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)

WORDS = """
a about above across after again against ago all almost alone along already also although always am
among an and another any anyone anything are around as at away back be became because become been
before began behind being below beside best better between beyond big both but by came can cannot
come could did different do does doing done down during each early either else end enough even ever
every everyone everything except far few first for found from front full further gave get give given
go goes going gone good got great had half has have having he held her here hers herself high him
himself his how however i if in indeed inside instead into is it its itself just keep kept kind knew
know known large last late later least left less let like likely little long look made make many may
maybe me mean might mine more most much must my myself near nearly need neither never new next no
nobody none nor not nothing now of off often oh okay old on once one only onto open or other others
our ours out outside over own part per perhaps please put quite rather really right said same saw
say second see seem seen several shall she should show side since small so some someone something
sometimes soon still such sure take taken tell than thank that the their theirs them then there
therefore these they thing think this those though thought three through thus till to today together
too took toward towards tried two under until up upon us use used usually very was way we well went
were what whatever when where whether which while who whole whom whose why will with within without
would yes yet you your yours yourself zero
able action add age air animal answer apple area arm art ask baby bag ball banana bank bar base
bathroom beach bear beautiful bed bedroom bench bicycle bike bird black blue board boat body book
bottle bottom bowl box boy bread bridge bright broccoli brother brown building bus button buy cake
call camera car card care carry case cat center chair change chart child children choice choose
church circle city class clean clear clock close clothes cloud cloudy coat coffee cold color column
come computer cook corner correct count country couple cover cow cup cut dark data date day deep
describe desk detail diagram dining direction dish distance document dog door drawing dress drink
drive driver eat edge eight elephant email empty equal event evening example eye face fact fall
family farm fast father feel feet fence field figure file fill find fire fish five flat floor flower
fly food foot form forest four frame friend fruit game garden gate giraffe girl glass glasses gray
grass green ground group grow guitar hair hall hand handle happy hat head hear heart heavy help
hill hold holding home horse hospital hot hotel hour house human hundred idea image inch island
jacket job keyboard kitchen kite knife label lady lake lamp land language laptop laugh leaf learn
leave leg letter level life lift light line list listen live living location logo lot love low lunch
machine main man map mark market match material meal meat meet men menu metal meter middle mile milk
minute mirror money month moon morning mother motorcycle mountain mouse mouth move movie music name
narrow nature neck news night nine north nose note number object ocean office oil orange order oven
page paint pair pan paper parent park parking people person phone photo picture piece pink pizza
place plain plan plane plant plastic plate platform play player point pole pool position possible
pot present price problem program public purple question quick rain read reading ready reason red
refrigerator report rest restaurant result return ride riding river road robot rock roof room round
row run running sand sandwich scene school screen sea seat sell send sentence set seven shadow shape
sheep shelf shirt shoe shop short shoulder sign silver simple sing single sink sit sitting six size
skateboard ski skin sky sleep slice slow smile snow soft sofa song sort sound soup south space
speak sport square stand standing star start state station stay step stone stop store story straight
street strong student study style sugar suit summer sun sunny surface surfboard sweet swim table
talk tall teacher team teeth television ten tennis text thick thin third thousand throw time tire
title toilet tool top touch towel tower town toy track traffic train travel tree trip truck true
truth turn type umbrella understand unit usual value vase vegetable video view village visible visit
voice wait walk walking wall want warm wash watch water wave wear wearing weather week weight west
wet wheel white wide wild wind window wine winter wish woman women wood wooden word work world write
writing written wrong year yellow yesterday young zebra zoo
"""

PHRASES = r"""
Describe this image in detail. Describe the picture in one sentence. Write a long caption.
What is in this image? What is shown here? What can you see in the photo? What is happening?
What color is the shirt? What colour is it? How many people are there? How many are visible?
Where is the dog? Who is holding the umbrella? Which one is larger? Why is she smiling?
Is there a cat on the chair? Are there any cars in the street? Does the man wear a hat?
Point to the red circle. Point at every window. Please count the birds. Locate the handle.
Answer with a single word or phrase. Answer the question briefly. Give a short answer.
Choose one of the following options: A. B. C. D. The correct answer is B. Answer: C
Yes, there is. No, there isn't. I don't know. It's not visible. I'm not sure. That's right.
You can't tell from the image. They're next to each other. We've seen it. He'll be there. She'd go.
Read the text on the sign. What does the sign say? Transcribe the document. What is the title?
According to the chart, the value in 2019 was 12.5%. The total is $1,250.00. Page 3 of 10.
There are two dogs and three cats in the picture. The image shows a person standing on a street.
In the background, there is a building with many windows. In the foreground, a table with food.
On the left side of the image, on the right side, at the top, at the bottom, in the middle.
This is a photograph of a city at night. The photo was taken outside on a sunny day.
Counting the objects shows a total of 5. Based on the picture, the answer is as follows.
User: Hello! How are you? Assistant: I'm fine, thank you. How can I help you today?
System: You are a helpful assistant. Let's think step by step. First, second, finally.
long_caption short_answer transcript point_count pointing caption style: vqa2: document: chart:
<point x="10.5" y="42.0" alt="cup">cup</point> <points x1="12.3" y1="45.6" x2="78.9" y2="90.1">
{"name": "value", "items": [1, 2, 3], "ok": true, "none": null} [0.25, 0.5, 0.75]
(x, y) #1 @ & * / + = ~
def main(): return None if x == 0 else x + 1 for i in range(10): print(i) import os class self.name
https://www.example.com/index.html 10:30 2024-05-17 100 200 500 1000 50% 3x 4K 90 degrees
0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 30 40 50 60 70 80 90
"""


def corpus() -> Iterator[str]:
    """Yields the training texts: scenes, then words in their lower-case and initial forms."""
    for idx in range(NUM_SCENES):
        plan = plan_scene(SCENE_SEED, idx)
        yield plan.caption
        yield from plan.transcripts
    words = WORDS.split()
    for _ in range(2):  # a pair must be seen twice to be merged
        yield " " + " ".join(words)
        yield "\n".join(word.capitalize() for word in words)
        yield from PHRASES.strip().splitlines()


def train(folder: Path) -> None:
    """Trains the tokenizer and writes tokenizer.json and tokenizer_config.json into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    fields = json.loads(tokenizer.to_str())
    # The older spelling of merges, "a b" for ["a", "b"]: tokenizers before 0.20 read no other.
    merges = fields["model"]["merges"]
    fields["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    _write(folder / "tokenizer.json", fields)
    config = {
        "add_prefix_space": False,
        "bos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 1_000_000_000,  # no limit: sequences are cut by the recipe
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(folder / "tokenizer_config.json", config)


def _write(path: Path, fields: dict[str, object]) -> None:
    text = json.dumps(fields, ensure_ascii=False, indent=0, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    train(Path(__file__).parent)
