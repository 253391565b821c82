"""Conversations in the layouts that people have, read as examples."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.formats import FORMATS, Spec, parse_row
from shardspec.errors import SampleError

SPEC = Spec(name="own", format="messages")
PNG = "data:image/png;base64,iVBORw0K"


def texts(row, spec=SPEC):
    example = parse_row(row, spec)
    (message,) = example["message_list"]
    system = [message["system"]] if "system" in message else []
    return [*system, *message["messages"]], example.get("image", [])


def said(*pairs, roles=("human", "gpt")):
    return [
        {"from": role, "value": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


LAYOUTS = {
    "llava": (
        {"id": "1", "image": "a.jpg", "conversations": said(("<image>\nWhat?", "A cup."))},
        (["What?", "A cup."], ["a.jpg"]),
    ),
    "llava, placeholder behind": (
        {"image": "a.jpg", "conversations": said(("What?\n<image>", "A cup."))},
        (["What?\n<|image|>", "A cup."], ["a.jpg"]),
    ),
    "llava-onevision, several turns": (
        {
            "image": ["a.jpg", "b.jpg"],
            "conversations": said(("<image>\nWho?", "Ann."), ("And <image> here?", "Bob.")),
        },
        (["<|image|>\nWho?", "Ann.", "And <|image|> here?", "Bob."], ["a.jpg", "b.jpg"]),
    ),
    "internvl, answers called a text": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "text": "Ann."}]},
        (["Who?", "Ann."], []),
    ),
    "several images in front": (
        {"image": ["a", "b"], "conversations": said(("<image>\n<image>\nDiffer?", "Yes."))},
        (["Differ?", "Yes."], ["a", "b"]),
    ),
    "text only": (
        {"conversations": said(("Hello", "Hi.")), "image": None},
        (["Hello", "Hi."], []),
    ),
    "no placeholder": (
        {"image": "a.jpg", "conversations": said(("What?", "A cup."))},
        (["What?", "A cup."], ["a.jpg"]),
    ),
    "sharegpt with system and tools": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Sum?"},
                {"from": "function_call", "value": "add(1, 2)"},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3."},
            ]
        },
        (["Be brief.", "Sum?", "add(1, 2)", "observation: 3", "It is 3."], []),
    ),
    "swift": (
        {
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": "A cup."},
            ],
            "images": ["a.jpg"],
        },
        (["What?", "A cup."], ["a.jpg"]),
    ),
    "trl parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Bird?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A wren."}]},
            ],
            "images": [{"bytes": b"x", "path": None}],
        },
        (["Bird?", "A wren."], [{"bytes": b"x", "path": None}]),
    ),
    "parts as Arrow stores them": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "See ", "image": None},
                        {"type": "image", "text": None, "image": "a.jpg"},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "I do.", "image": None}],
                },
            ],
        },
        (["See <|image|>", "I do."], ["a.jpg"]),
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": "Read."},
                {"role": "user", "content": "Total?"},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}],
                },
                {"role": "assistant", "content": "12.40", "weight": 1},
            ]
        },
        (["Read.", "Total?\n<|image|>", "12.40"], [PNG]),
    ),
    "openai, responses": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "input_text", "text": "Read."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Whose is "},
                        {"type": "input_image", "image_url": PNG, "detail": "auto"},
                        {"type": "input_image", "image_url": {"url": "b.png", "detail": "low"}},
                        {"type": "image_url", "image_url": "c.png"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't."}]},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Privacy."}]},
            ]
        },
        (
            ["Read.", "Whose is <|image|><|image|><|image|>", "I won't.", "Why?", "Privacy."],
            [PNG, "b.png", "c.png"],
        ),
    ),
    "openai, refusals and calls beside an empty content": (
        {
            "messages": [
                {"role": "user", "content": "Now?"},
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "clock", "arguments": "{}"},
                },
                {"role": "function", "name": "clock", "content": "12:40"},
                {"role": "user", "content": "And who asks?"},
                {"role": "assistant", "content": None, "refusal": "I won't say."},
            ]
        },
        (["Now?", "clock({})", "function clock: 12:40\nAnd who asks?", "I won't say."], []),
    ),
    "an image and no text": (
        {"image": "a", "conversations": said(("<image>", "A cup."), ("Red?", "No."))},
        (["<|image|>", "A cup.", "Red?", "No."], ["a"]),
    ),
    "an image without placeholder and no text": (
        {"image": ["a", "b"], "conversations": said((" ", "Two cups."))},
        (["<|image|><|image|>", "Two cups."], ["a", "b"]),
    ),
    "an image and no text, as parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a"}]},
                {"role": "assistant", "content": "A cup."},
            ]
        },
        (["<|image|>", "A cup."], ["a"]),
    ),
    "an image and no text, as a pair": (
        {"images": ["a"], "texts": [{"user": "", "assistant": "A cup."}]},
        (["<|image|>", "A cup."], ["a"]),
    ),
    "anthropic": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/png",
                                "data": "iVBORw0K",
                            },
                        },
                        {"type": "text", "text": "Read it.", "source": None},
                    ],
                },
                {"role": "assistant", "content": "Platform 4"},
            ]
        },
        (["Read it.", "Platform 4"], [PNG]),
    ),
    "minicpm": (
        {
            "image": {"<image_00>": "a.jpg", "<image_01>": "b.jpg"},
            "conversations": [
                {"role": "user", "content": "<image_01> or\n<image_00>?"},
                {"role": "assistant", "content": "b"},
            ],
        },
        (["<|image|> or\n<|image|>?", "b"], ["b.jpg", "a.jpg"]),
    ),
    "numbered from 1": (
        {
            "images": ["a", "b"],
            "conversations": said(("In <image 2>, x? See <image 1> and <image 2>.", "3")),
        },
        (["In <|image|>, x? See <|image|> and <|image|>.", "3"], ["b", "a", "b"]),
    ),
    "llava-instruct-mix": (
        {
            "images": ["a", "b"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": 1.0, "text": None, "type": "image"},
                        {"index": None, "text": "or", "type": "text"},
                        {"index": 0.0, "text": None, "type": "image"},
                    ],
                },
                {"role": "assistant", "content": "1"},
            ],
        },
        (["<|image|>or<|image|>", "1"], ["b", "a"]),
    ),
    "parts that are numbered": (
        {
            "images": ["a"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"index": 0, "text": "See", "type": "text"},
                        {"index": 1, "type": "image"},
                    ],
                },
                {"role": "assistant", "content": "1"},
            ],
        },
        (["See<|image|>", "1"], ["a"]),
    ),
    "tools": (
        {
            "messages": [
                {"role": "system", "content": "Help."},
                {"role": "user", "content": "Now?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "12:40"},
                {"role": "assistant", "content": "12:40."},
            ],
            "tools": [{"type": "function", "function": {"name": "clock"}}, {"type": "x"}],
        },
        (
            [
                'Help.\n\n{"type": "function", "function": {"name": "clock"}}\n{"type": "x"}',
                *("Now?", "clock({})", "tool: 12:40", "12:40."),
            ],
            [],
        ),
    ),
    "calls with arguments that are no text": (
        {
            "messages": [
                {"role": "user", "content": "On?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "lamp", "arguments": {"on": True}}}],
                },
            ],
        },
        (["On?", 'lamp({"on": true})'], []),
    ),
    "one tool, not in a list": (
        {"conversations": said(("Now?", "12:40.")), "tools": {"name": "clock"}},
        (['{"name": "clock"}', "Now?", "12:40."], []),
    ),
    "tools as a text": (
        {
            "conversations": said(("Now?", "12:40.")),
            "tools": '[{"name": "clock"}]',
            "system": "",
        },
        (['[{"name": "clock"}]', "Now?", "12:40."], []),
    ),
    "end that is not learned": (
        {
            "image": ["a", "b"],
            "messages": [
                {"role": "user", "content": "<image>Who?"},
                {"role": "assistant", "content": "Ann."},
                {"role": "user", "content": "And <image>?"},
                {"role": "assistant", "content": "Bob.", "train": False},
            ],
        },
        (["Who?", "Ann."], ["a"]),
    ),
}


@pytest.mark.parametrize(
    "marks, weights",
    [
        ([{}, {}, {}], None),
        ([{"train": True}, {"weight": 1}, {"loss": 1}], None),
        ([{"train": False}, {}, {}], [0, 1, 1]),
        ([{}, {"weight": 0}, {}], [1, 0, 1]),
        ([{"loss": False}, {"weight": 0.5}, {"weight": 2}], [0, 0.5, 2]),
        ([{"train": True, "weight": 0}, {}], [0, 1]),
        ([{"train": None}, {"weight": 0.0}, {}, {"train": False}], [1, 0, 1]),
    ],
)
def test_answers_without_loss_stay_and_those_at_the_end_do_not(marks, weights):
    turns = []
    for t, mark in enumerate(marks):
        turns.append({"role": "user", "content": f"q{t}", **({"weight": 0} if t else {})})
        turns.append({"role": "assistant", "content": f"a{t}", **mark})
    (message,) = parse_row({"messages": turns}, SPEC)["message_list"]
    assert message.get("turn_weights") == weights
    kept = len(weights or marks)
    assert message["messages"] == [text for t in range(kept) for text in (f"q{t}", f"a{t}")]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_beside_an_answer_is_kept_apart(name):
    turns = [
        *({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: None}),
        *({"role": "user", "content": "c"}, {"role": "assistant", "content": "d", name: "Hm."}),
    ]
    (message,) = parse_row({"messages": turns}, SPEC)["message_list"]
    assert message["reasoning"] == [None, "Hm."]
    (message,) = parse_row({"messages": turns[:2]}, SPEC)["message_list"]
    assert "reasoning" not in message
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "d"}]
    turns[3] = {"role": "assistant", "content": parts}
    (message,) = parse_row({"messages": turns}, SPEC)["message_list"]
    assert (message["reasoning"], message["messages"][3]) == ([None, "Hm."], "d")
    with pytest.raises(SampleError):
        parse_row({"messages": [{"role": "user", "content": parts}, turns[3]]}, SPEC)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_read_with_its_images_in_their_places(name):
    row, want = LAYOUTS[name]
    assert texts(row) == want


REFUSED = {
    "too few images": (
        {"image": "a", "conversations": said(("<image><image>?", "x"))},
        "placeholder_without_image",
    ),
    "too many images": (
        {"image": ["a", "b"], "conversations": said(("<image>?", "x"))},
        "image_without_placeholder",
    ),
    "placeholder without image": (
        {"conversations": said(("<image>?", "x"))},
        "placeholder_without_image",
    ),
    "image of the assistant": (
        {
            "images": ["a"],
            "messages": [
                {"role": "user", "content": "Draw."},
                {"role": "assistant", "content": [{"type": "image"}]},
            ],
        },
        "image_placeholder",
    ),
    "starts with the assistant": (
        {"conversations": said(("Hello", "Hi"), roles=("gpt", "human"))[:1]},
        "assistant_first",
    ),
    "ends with the user": ({"conversations": said(("a", "b"), ("c", "d"))[:3]}, "conversation"),
    "two answers": (
        {"conversations": [*said(("a", "b")), {"from": "gpt", "value": "c"}]},
        "conversation",
    ),
    "empty answer": ({"conversations": said(("a", " "))}, "empty_answer"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "conversation"),
    "turn that is none": ({"messages": ["hello"]}, "conversation"),
    "part that is none": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "conversation",
    ),
    "part that is two": (
        {"messages": said(([{"text": "x", "image": "a"}], "b"))},
        "conversation",
    ),
    "part that is two, of which one is empty": (
        {"messages": said(([{"text": "", "image": "a"}], "b"))},
        "conversation",
    ),
    "parts as a text": (
        {
            "image": "a",
            "messages": [
                {"role": "user", "content": '[{"type": "image"}, {"type": "text", "text": "x"}]'},
                {"role": "assistant", "content": "b"},
            ],
        },
        "conversation",
    ),
    "nothing learned": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "loss": False},
            ]
        },
        "conversation",
    ),
    "reasoning that is not a text": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "thinking": {"text": "c"}},
            ]
        },
        "conversation",
    ),
    **{
        f"{name} of {value!r}": (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", name: value},
                ]
            },
            "conversation",
        )
        for name, value in [
            *(("train", "false"), ("loss", "0"), ("weight", -1), ("weight", float("nan"))),
        ]
    },
    **{
        f"column {name}": (
            {"conversations": said(("What happens?", "x")), name: value},
            "row_media",
        )
        for name, value in [("video", "a.mp4"), ("videos", ["a.mp4"]), ("audios", ["a.wav"])]
    },
    "neither text nor image": ({"conversations": said((" ", "x"))}, "empty_user"),
    "neither text nor image in a pair": (
        {"texts": [{"user": "", "assistant": "x"}], "images": []},
        "empty_user",
    ),
    "no text in one of the pairs": (
        {"texts": [{"user": u, "assistant": "x"} for u in ("a", "")], "images": ["a"]},
        "empty_user",
    ),
    "image by number of a file": (
        {"messages": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]},
        "conversation",
    ),
    "no turns": ({"image": "a.jpg", "text": "x"}, "row_fields"),
    "turns as a text": ({"messages": "hello"}, "row_fields"),
    "system texts as a list": (
        {"conversations": said(("Now?", "12:40.")), "system": ["Help."]},
        "row_fields",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_row_that_cannot_be_read_has_a_reason(name):
    row, reason = REFUSED[name]
    with pytest.raises(SampleError) as caught:
        texts(row)
    assert caught.value.reason == reason


def in_turn(number):
    return [
        {"role": role, "content": f"{role} {i}"}
        for i in range(number)
        for role in ("user", "assistant")
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_turn_is_in_front_or_counted_and_never_moved(role):
    turn = {"role": role, "content": "Be brief."}
    plain = [each["content"] for each in in_turn(3)]
    for place in range(7):
        turns = in_turn(3)
        turns.insert(place, turn)
        if place in (0, 6):  # nothing that is learned follows the last
            assert texts({"messages": turns})[0] == ["Be brief."] * (place == 0) + plain
            continue
        with pytest.raises(SampleError) as caught:
            texts({"messages": turns})
        assert caught.value.reason == "conversation"
        assert "in front" in caught.value.fix
        turns[place] = {**turn, "content": " "}
        assert texts({"messages": turns})[0] == plain


def test_system_turns_in_front_are_joined():
    turns = [{"role": role, "content": role} for role in ("system", "developer")]
    assert texts({"messages": turns + in_turn(1)})[0][0] == "system\n\ndeveloper"


TOOLS = ("tool", "tool_response", "observation", "function", "function_response", "ipython")


@pytest.mark.parametrize("role", TOOLS)
def test_result_of_a_tool_keeps_its_role_and_is_never_learned(role):
    for place in range(1, 4):
        turns = in_turn(3)
        result = {"role": role, "content": "3", "weight": 1, "train": True}
        turns[2:3] = [result] * place + [turns[2]]
        assert texts({"messages": turns})[0][2] == f"{role}: 3\n" * place + "user 1"
        assert texts({"messages": turns})[0][1::2] == [f"assistant {i}" for i in range(3)]


VIDEO_SPEC = Spec(name="own", format="llava", columns={"video": "video"})

VIDEOS = {
    "llava": (
        {"video": "a.mp4", "conversations": said(("<video>\nWhat?", "A cup."))},
        (["What?", "A cup."], [], "a.mp4", None),
    ),
    "llava, called an image": (
        {"video": "a.mp4", "conversations": said(("See <image>.", "A cup."))},
        (["See <|video|>.", "A cup."], [], "a.mp4", None),
    ),
    "no placeholder": (
        {"video": "a.mp4", "start": 1, "end": 2.5, "conversations": said(("What?", "A cup."))},
        (["What?", "A cup."], [], "a.mp4", [1, 2.5]),
    ),
    "two videos in their order": (
        {
            "video": ["a.mp4", "b.mp4"],
            "start": [None, 2],
            "conversations": said(("First <video>, then <|video|>?", "Same.")),
        },
        (
            ["First <|video|>, then <|video|>?", "Same."],
            [],
            ["a.mp4", "b.mp4"],
            [None, [2, None]],
        ),
    ),
    "a video and images": (
        {
            "image": ["a.jpg", "b.jpg"],
            "video": "c.mp4",
            "conversations": said(("<image><video> or <image>?", "The first."), ("Sure?", "Yes.")),
        },
        (
            ["<|image|><|video|> or <|image|>?", "The first.", "Sure?", "Yes."],
            ["a.jpg", "b.jpg"],
            "c.mp4",
            None,
        ),
    ),
    "images in front of a video": (
        {
            "image": "a.jpg",
            "video": "c.mp4",
            "conversations": said(("<image>\n<video>\nSame?", "Yes.")),
        },
        (["Same?", "Yes."], ["a.jpg"], "c.mp4", None),
    ),
    "a video in front of images": (
        {
            "image": "a.jpg",
            "video": "c.mp4",
            "conversations": said(("<video><image>Same?", "Yes.")),
        },
        (["<|video|><|image|>Same?", "Yes."], ["a.jpg"], "c.mp4", None),
    ),
    "a video without a placeholder beside an image with one": (
        {
            "image": "a.jpg",
            "video": "c.mp4",
            "conversations": said(("Is <image> in it?", "Yes.")),
        },
        (["<|video|>Is <|image|> in it?", "Yes."], ["a.jpg"], "c.mp4", None),
    ),
    "parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "Compare "},
                        {"type": "video", "video": "a.mp4", "video_start": 1.5, "video_end": 4},
                        {"type": "image", "image": "b.jpg"},
                        {"type": "video_url", "video_url": {"url": "https://x.test/c.mp4"}},
                        {"type": "video", "path": "d.mp4"},
                    ],
                },
                {"role": "assistant", "content": "Alike."},
            ]
        },
        (
            ["Compare <|video|><|image|><|video|><|video|>", "Alike."],
            ["b.jpg"],
            ["a.mp4", "https://x.test/c.mp4", "d.mp4"],
            [[1.5, 4], None, None],
        ),
    ),
    "parts with a column": (
        {
            "video": [{"path": "a.mp4", "start": 2, "end": 3}],
            "messages": [
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            ],
        },
        (["What?", "A cup."], [], "a.mp4", [2, 3]),
    ),
    "turns that are left out take their videos along": (
        {
            "video": ["a.mp4", "b.mp4"],
            "conversations": [
                *said(("Play <video>.", "A cup.")),
                *said(("And <video>?", "A pan.")),
            ],
        },
        (["Play <|video|>.", "A cup."], [], "a.mp4", None),
    ),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_of_conversations_stay_where_their_placeholders_are(name):
    row, (said_texts, images, video, clip) = VIDEOS[name]
    if name.startswith("turns"):
        row["conversations"][-1]["loss"] = False
    example = parse_row(row, VIDEO_SPEC)
    assert texts(row, VIDEO_SPEC) == (said_texts, images)
    assert (example["video"], example.get("clip")) == (video, clip)


@pytest.mark.parametrize(
    "video, text, reason",
    [
        ("a.mp4", "<video><video>?", "placeholder_without_video"),
        (None, "<video>?", "placeholder_without_video"),
        (["a.mp4", "b.mp4"], "<video>?", "video_without_placeholder"),
        (["a.mp4"], "<image><image>?", "placeholder_without_video"),
        ([["1.jpg", "2.jpg"]], "<video>?", "row_fields"),
    ],
)
def test_another_number_of_videos_than_of_placeholders_has_a_reason(video, text, reason):
    row = {"video": video, "conversations": said((text, "x"))}
    with pytest.raises(SampleError) as caught:
        parse_row(row, VIDEO_SPEC)
    assert caught.value.reason == reason


def spoken(part, role="user"):
    turns = [(role, [part]), ("assistant", "x")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    "row, spec, reason",
    [
        (spoken({"type": "video", "video": "a.mp4"}), SPEC, "row_media"),
        (spoken({"type": "video_url"}, role="system"), VIDEO_SPEC, "image_placeholder"),
        (
            {"video": "a.mp4", "start": [1, 2], "conversations": said(("?", "x"))},
            VIDEO_SPEC,
            "row_fields",
        ),
        (
            {"video": "a.mp4", "conversations": said(("?", "x"))},
            Spec(
                name="own",
                format="llava",
                columns={"video": "video"},
                missing_placeholder="refuse",
            ),
            "video_without_placeholder",
        ),
    ],
)
def test_other_videos_are_refused(row, spec, reason):
    with pytest.raises(SampleError) as caught:
        parse_row(row, spec)
    assert caught.value.reason == reason


def test_missing_placeholder_can_be_refused():
    row = {"image": "a.jpg", "conversations": said(("What?", "A cup."))}
    with pytest.raises(SampleError) as caught:
        texts(row, Spec(name="own", format="llava", missing_placeholder="refuse"))
    assert caught.value.reason == "image_without_placeholder"


def test_columns_can_have_other_names():
    spec = Spec(name="own", format="llava", columns={"messages": "dialog", "image": "pic"})
    row = {"dialog": said(("<image>What?", "A cup.")), "pic": "a.jpg"}
    assert texts(row, spec) == (["What?", "A cup."], ["a.jpg"])


words = st.text(st.characters(exclude_characters="<>|", exclude_categories=("Cs",)), min_size=1)


@given(
    turns=st.lists(
        st.tuples(st.lists(words, min_size=1, max_size=3), words.filter(str.strip)), min_size=1
    )
)
def test_texts_and_places_are_those_of_the_source(turns):
    """Each user text is cut by its images, wherever they are: nothing else changes."""
    images = [f"{t}-{i}" for t, (parts, _) in enumerate(turns) for i in range(len(parts) - 1)]
    row = {
        "image": images,
        "conversations": said(*(("<image>".join(parts), answer) for parts, answer in turns)),
    }
    got, placed = texts(row)
    assert placed == images
    assert got[1::2] == [answer for _, answer in turns]
    want = ["<|image|>".join(parts) for parts, _ in turns]
    in_front = want[0].replace("<|image|>", "", len(images)).lstrip()
    if got[0] != want[0]:
        assert got[0].strip() == in_front.strip()
        assert want[0][: -len(got[0]) or None].replace("<|image|>", "").strip() == ""
    assert got[2::2] == want[1:]


@given(
    row=st.dictionaries(
        st.sampled_from(
            ["messages", "conversations", "image", "caption", "question", "answer", "answers"]
            + ["options", "points", "label"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["role", "content", "from", "value", "type", "text", "x", "y"]),
                    inner,
                )
            ),
            max_leaves=8,
        ),
    )
)
@pytest.mark.parametrize("name", FORMATS)
def test_any_row_becomes_an_example_or_one_bad_row(name, row):
    with contextlib.suppress(SampleError):
        assert "message_list" in parse_row(row, Spec(name="own", format=name))


def test_mapping_names_the_placeholders_of_its_images():
    turns = [
        {"role": "user", "content": "<image 1> of url after <image 0>, <image 1>?"},
        {"role": "assistant", "content": "Yes."},
    ]
    row = {"messages": turns, "image": {"<image 0>": "a.jpg", "<image 1>": "b.jpg", "<x>": ""}}
    example = parse_row(row, Spec(name="own", format="messages"))
    assert example["image"] == ["b.jpg", "a.jpg", "b.jpg"]
    (text, _) = example["message_list"][0]["messages"]
    assert text == "<|image|> of url after <|image|>, <|image|>?"


def test_mapping_without_placeholders_is_not_a_list_of_them():
    turns = [
        {"role": "user", "content": "See the url <image>."},
        {"role": "assistant", "content": "Yes."},
    ]
    row = {"messages": turns, "image": {"url": "a.jpg"}}
    example = parse_row(row, Spec(name="own", format="messages"))
    assert example["message_list"][0]["messages"][0] == "See the url <|image|>."


def test_page_that_a_conversation_is_from_is_not_its_image():
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    row = {"messages": turns, "url": "https://example.org/page"}
    assert "image" not in parse_row(row, Spec(name="own", format="messages"))


def test_text_that_names_its_images_has_them_in_their_places():
    turns = [
        {"from": "user", "value": "Picture 1: <img>maps/a.png</img>\nWhere is the lake?"},
        {"from": "assistant", "value": "<ref>the lake</ref>"},
    ]
    example = parse_row({"conversations": turns}, Spec(name="own", format="llava"))
    assert example["image"] == ["maps/a.png"]
    (text, _) = example["message_list"][0]["messages"]
    assert text == "Picture 1: <|image|>\nWhere is the lake?"
