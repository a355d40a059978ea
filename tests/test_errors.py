"""What a user is told to have meant."""

from __future__ import annotations

import pytest

from lavis_xformer.errors import UserError, nearest, one_of


def test_all_of_few_names_the_similar_ones_first():
    assert nearest("bat", ["dog", "cat", "cow"]) == "did you mean 'cat'? There is: cat, cow, dog"
    assert nearest("zzz", ["dog", "cat"]) == "there is: cat, dog"
    assert nearest("zzz", []) == "there is: nothing"


def test_the_nearest_of_many_names_and_how_many_others():
    keys = [f"key_{i:02d}" for i in range(40)] + ["batch_size_train", "batch_size_eval"]
    said = nearest("batchsize_train", keys)
    assert said.startswith("did you mean 'batch_size_train'? There is: batch_size_train, batch_size_eval, ")
    assert said.endswith(" and 34 others")
    assert len(said) < 200


def test_a_value_that_is_none_of_the_options_is_named_with_its_key():
    assert one_of("run.pet", "cat", iter(["dog", "cat"])) == "cat"
    for value in (None, 3, ["cat"]):
        with pytest.raises(UserError) as raised:
            one_of("run.pet", value, {"dog": 1, "cat": 2})
        assert str(raised.value).startswith(f"run.pet: '{value}'; ")
