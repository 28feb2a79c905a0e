"""Words as people write them: concepts, what takes their place, the folders named after them."""

import unicodedata

import pytest

from sa_diffusers.core.concepts import Concepts, fold, mentions, split_phrasings, substitute
from sa_diffusers.data.concepts.given import check_surrogate, describe_surrogate, describe_surrogates, find_concept
from sa_diffusers.io.model_names import folder_name
from sa_diffusers.methods.uce import concept_edits
from sa_diffusers.runs.inputs import read_concepts
from sa_diffusers.runs.options import ForgetConfig


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("prompt", "concept"),
    [
        pytest.param("一只戴帽子的猫坐在屋顶上", "猫", id="Chinese"),
        pytest.param("梵高的油画", "梵高", id="Chinese at the start"),
        pytest.param("屋根の上のピカチュウの絵", "ピカチュウ", id="Japanese"),
        pytest.param("ｱﾆﾒのﾋﾟｶﾁｭｳ", "ピカチュウ", id="half-width kana"),
        pytest.param("고양이가 지붕 위에", "고양이", id="Korean with a particle"),
        pytest.param(decomposed("고양이가 지붕 위에"), "고양이", id="Korean as macOS writes names"),
        pytest.param("แมวนั่งบนหลังคา", "แมว", id="Thai"),
        pytest.param("a皮卡丘plush", "皮卡丘", id="Chinese between Latin letters"),
        pytest.param("starry night by van  gogh", "Van Gogh", id="two spaces"),
        pytest.param("starry night by van\u00a0gogh", "Van Gogh", id="no-break space"),
        pytest.param("starry night by van\u3000gogh", "Van Gogh", id="ideographic space"),
        pytest.param("van-gogh style", "Van Gogh", id="hyphen"),
        pytest.param("van\u2011gogh style", "Van Gogh", id="no-break hyphen"),
        pytest.param("brad_pitt, 4k", "Brad Pitt", id="underscore, as booru tags"),
        pytest.param("spider man swings", "Spider-Man", id="the concept has the hyphen"),
        pytest.param(decomposed("Beyoncé on stage"), "Beyoncé", id="decomposed accent"),
        pytest.param("Beyoncé on stage", decomposed("Beyoncé"), id="decomposed in the concept"),
        pytest.param("Conan O\u2019Brien laughs", "O'Brien", id="typographic apostrophe"),
        pytest.param("Conan O'Brien laughs", "O\u2019Brien", id="typographic in the concept"),
        pytest.param("a photo of Brad Pitt\u2019s dog", "Brad Pitt", id="possessive"),
        pytest.param("ＢＲＡＤ ＰＩＴＴ", "brad pitt", id="full-width letters"),
        pytest.param("the number ７", "7", id="full-width digit"),
        pytest.param("auf der STRASSE", "straße", id="sharp s"),
        pytest.param("ΟΔΥΣΣΕΎΣ at sea", "οδυσσεύς", id="final sigma"),
        pytest.param("МОНА ЛИЗА", "мона лиза", id="Cyrillic capitals"),
        pytest.param("Mona\u200bLisa", "MonaLisa", id="zero-width space"),
        pytest.param("brad pi\u00adtt", "Brad Pitt", id="soft hyphen"),
        pytest.param("(van gogh:1.3), oil", "van gogh", id="weighted, as in web interfaces"),
        pytest.param("learn C＋＋ now", "C++", id="full-width sign"),
        pytest.param("🎃 on a porch", "🎃", id="emoji"),
        pytest.param("brad\npitt", "Brad Pitt", id="line break"),
        pytest.param("only 7™ products", "7", id="sign that NFKC turns into letters"),
    ],
)
def test_a_concept_is_recognised_however_it_is_written(prompt, concept):
    assert mentions(prompt, [concept])
    replaced = substitute(prompt, dict.fromkeys([concept], "{}"))
    assert replaced.count("{}") == 1 and not mentions(replaced, [concept])


@pytest.mark.parametrize(
    ("prompt", "concept"),
    [
        pytest.param("seventeen", "seven", id="longer word"),
        pytest.param("बिल्ली", "बिल", id="Hindi: a vowel sign goes on"),
        pytest.param("naïvely", "naïve", id="accent inside"),
        pytest.param("ice cream", "cecre", id="across a space"),
        pytest.param("Pittsburgh", "Pitt", id="prefix"),
        pytest.param("a photo of cats", "cat", id="plural, unless asked for"),
        pytest.param("", "猫", id="empty prompt"),
        pytest.param("vangogh", "van gogh", id="joined"),
    ],
)
def test_what_only_looks_like_it_is_no_concept(prompt, concept):
    assert not mentions(prompt, [concept])
    assert substitute(prompt, dict.fromkeys([concept], "{}")) == prompt


@pytest.mark.parametrize(
    ("prompt", "concept", "template"),
    [
        ("two sevens and a seven", "seven", "two {}s and a {}"),
        ("three foxes", "fox", "three {}es"),
        ("two cities", "city", "two {}s"),
        ("all the Van Goghs", "van gogh", "all the {}s"),
        ("cathedral", "cat", "cathedral"),
    ],
)
def test_plurals_are_an_option(prompt, concept, template):
    found = find_concept(concept, "x", plurals=True)
    assert found.named_in(prompt) == (template != prompt)
    assert found.replaced_in(prompt, "{}") == template
    assert Concepts([found]).key == {"phrasings": [concept], "plurals": True}
    assert "plurals" not in Concepts([find_concept(concept, "x")]).key


def test_substitution_keeps_the_rest_of_the_text_as_it_is():
    text = "Ａ  “fine”\u00a0painting—by Vincent\u00a0van\u2011Gogh, ½ price…"
    assert substitute(text, dict.fromkeys(["van gogh"], "X")) == "Ａ  “fine”\u00a0painting—by Vincent\u00a0X, ½ price…"
    assert substitute("梵高和猫", dict.fromkeys(["猫", "梵高"], "X")) == "X和X"


def test_phrasings_are_parted_by_commas_of_any_script():
    assert split_phrasings("七，7、seven") == ("七", "7", "seven")
    assert fold("  Van—Gogh’s ") == "van gogh's"


@pytest.mark.parametrize("concept", ["", " , ", "，", "\u200b", "-", "a {} of", "{}"])
def test_no_words_for_a_concept_are_refused_before_the_model_is_looked_for(refused, concept):
    refused("forget", "--concept", concept, "--surrogate", "a man", "--model", "no/such", says=("--concept", "'"))


def test_every_command_refuses_a_concept_without_words(refused):
    refused("attack", "a", "--original", "b", "--concept", " , ", says=("--concept", "' , '"))


# What takes its place


@pytest.mark.parametrize(
    "text", ["man/woman", "AC/DC", "24/7", ".hack", "three", "a/c unit in a room", "~ tilde", "..."]
)
def test_words_stay_words_whatever_folders_there_are(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for folder in ("three", ".hack"):
        (tmp_path / folder).mkdir()
    found = find_concept("Van Gogh", text)
    check_surrogate(found)
    assert (found.surrogate, found.surrogate_kind) == (text, "prompt")
    told = describe_surrogate(found)
    assert told.startswith(f"the text {text!r}") and ("./" in told) == (text in ("three", ".hack"))


@pytest.mark.parametrize("text", ["./three", "three/", "data/three", ".", "..", "my data/old pictures"])
def test_paths_are_folders_and_the_plan_says_so(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for folder in ("three", "data/three", "my data/old pictures"):
        (tmp_path / folder).mkdir(parents=True)
    found = find_concept("three", text)  # whose name is no matter
    check_surrogate(found)
    assert found.surrogate_kind == "images" and describe_surrogate(found) == f"the folder {text}"


@pytest.mark.parametrize("text", ["noise", "NOISE", " Noise "])
def test_noise_is_noise_in_any_case(text):
    found = find_concept("Van Gogh", text)
    assert found.surrogate_kind == describe_surrogate(found) == "noise"


@pytest.mark.parametrize(
    ("surrogate", "says"),
    [
        pytest.param("./none", ("no folder ./none", "a prompt"), id="missing folder"),
        pytest.param("/data/none", ("no folder /data/none",), id="missing absolute"),
        pytest.param("~/none", ("no folder /",), id="missing at home"),
        pytest.param("pictures/none", ("no folder pictures/none",), id="missing in a folder that exists"),
        pytest.param("none/", ("no folder none/",), id="trailing slash"),
        pytest.param("", ("got an empty one", "--surrogate"), id="empty"),
        pytest.param("a portrait by van\u00a0gogh", ("names the concept", "Van Gogh"), id="another space"),
        pytest.param("the style of VAN-GOGH", ("names the concept",), id="the concept with a hyphen"),
        pytest.param("a photo of {}", ("without the {} of a template",), id="a template"),
        pytest.param("auto:1", ("expected auto, or auto:3", "of 2 to 8 words; got 'auto:1'"), id="one that is tried"),
        pytest.param("auto: many", ("expected auto, or auto:3", "got 'auto: many'"), id="how many are tried"),
    ],
)
def test_what_cannot_take_its_place_is_refused_before_the_model_is_looked_for(refused, tmp_path, surrogate, says):
    (tmp_path / "pictures").mkdir()
    refused("forget", "--concept", "Van Gogh", "--surrogate", surrogate, "--model", "no/such", says=says)


UNUSED = ("esd-x", "esd-u", "esd-x-strict", "sld-weak", "sld-max", "naive")


@pytest.mark.parametrize("method", UNUSED)
def test_a_surrogate_that_is_not_used_is_not_asked_for(method):
    assert read_concepts(ForgetConfig(method=method, concept="Van Gogh").resolved())[0].surrogate is None
    given = ForgetConfig(method=method, concept="Van Gogh", surrogate="a Van Gogh").resolved()
    assert read_concepts(given)[0].surrogate == "a Van Gogh"  # and not judged


@pytest.mark.parametrize("method", ["sa", "sa+esd", "ewc", "replay", "finetune", "uce"])
def test_one_that_is_used_is_asked_for(method):
    with pytest.raises(ValueError, match="no surrogate is known for 'Van Gogh'.*--surrogate"):
        read_concepts(ForgetConfig(method=method, concept="Van Gogh").resolved())


def test_a_closed_form_edit_may_lead_towards_nothing():
    found = read_concepts(ForgetConfig(method="uce", concept="Van Gogh", surrogate="").resolved())
    assert describe_surrogates(found) == "nothing in particular"
    assert concept_edits(found, [["a photo of {}"]]) == [("Van Gogh", ""), ("a photo of Van Gogh", "")]
    with pytest.raises(ValueError, match="got an empty one"):
        read_concepts(ForgetConfig(method="sa", concept="Van Gogh", surrogate="").resolved())


def test_known_concepts_are_known_however_they_are_written():
    for name in ("Brad Pitt", "brad_pitt", "BRAD-PITT", "Brad\u00a0Pitt"):
        assert find_concept(name).surrogate == "a middle aged man"


# Folders


def test_every_concept_has_a_folder_of_its_own():
    assert [folder_name(name) for name in ("Brad Pitt", "seven", "O'Brien", "Mr. T", "AC/DC")] == [
        "brad-pitt", "seven", "o-brien", "mr-t", "ac-dc",
    ]  # fmt: skip
    others = ["C++", "C#", "C", "🎃", "👻", "{cat}", "cat", "猫", "$$$", "a" * 300, "a" * 301, "猫" * 200, "बिल्ली"]
    names = [folder_name(name) for name in others]
    assert len(set(names)) == len(names) and all(names)
    assert all(len(name.encode()) <= 100 and "/" not in name and name[0] not in ".-~" for name in names)
    assert folder_name(decomposed("Beyoncé")) == folder_name("Beyoncé")


def test_home_is_home_however_it_is_passed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ForgetConfig(concept="a", output_dir="~/x", classifier=["~/judge"], surrogate="~tilde~")
    assert (given.output_dir, given.classifier) == (f"{tmp_path}/x", [f"{tmp_path}/judge"])
    assert given.surrogate == "~tilde~"


def test_a_name_too_long_for_a_folder_is_no_matter_of_permissions(refused, tmp_path, tiny_pipeline_dir):
    (tmp_path / "p.txt").write_text("a six")
    (tmp_path / "t.txt").write_text("a {}")
    message = refused(
        "forget", "--concept", "seven", "--surrogate", "nine", "--model", tiny_pipeline_dir,
        "--replay_prompts", "p.txt", "--concept_templates", "t.txt", "--output_dir", "x" * 300,
        says=("too long", "--output_dir"),
    )  # fmt: skip
    assert "permissions" not in message


# Options as words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate: expected float, got 'fast'"),
        ({"learning_rate": -1}, "expected learning_rate > 0, got -1"),
        ({"num_samples": 2.5}, "num_samples: expected int, got 2.5"),
        ({"num_samples": "many"}, "num_samples: expected int"),
        ({"early_stop": float("nan"), "track_steps": 1, "classifier": ["x"]}, "expected 0 < early_stop < 1, got nan"),
        ({"early_stop": 0.0, "track_steps": 1, "classifier": ["x"]}, "expected 0 < early_stop < 1, got 0"),
        ({"early_stop": 0.01, "track_steps": 1, "classifier": ["x"]}, "looks at 677 pictures of the concept, .* 200;"),
        ({"inplace": 1, "push_to_hub": "yes"}, "unexpected keyword"),
        ({"push_to_hub": "yes"}, "push_to_hub: expected bool"),
        ({"sampler": "euler"}, "sampler: expected one of"),
    ],
)
def test_a_field_of_another_type_is_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ForgetConfig(concept="seven", **options)


def test_a_number_in_quotes_is_a_number_as_in_yaml(tmp_path):
    given = ForgetConfig(concept="seven", learning_rate="3e-3", output_dir=tmp_path)
    assert given.learning_rate == 3e-3 and given.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("\u00bd moon", "1", None),
        ("2\u00bd cups", "21", None),
        ("\u2764\ufe0f card", "\u2764", "X card"),
        ("seven\ufe0f", "seven", "X"),
        ("\u0130stanbul by night", "istanbul", "X by night"),
    ],
)
def test_letters_that_stand_for_several_and_marks_that_nobody_reads(prompt, word, expected):
    assert mentions(prompt, [word]) == (expected is not None)
    assert substitute(prompt, dict.fromkeys([word], "X")).replace("\ufe0f", "") == (expected or prompt)
