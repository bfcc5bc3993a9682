import pytest
import torch

from relic.nn.denoiser import Denoiser
from relic.nn.text import WordTable, WordTableConfig
from tests.worlds import NANO


def test_a_fresh_table_says_nothing_and_learns_only_the_words_it_sees():
    table = WordTable(WordTableConfig(width=4))
    ids = torch.tensor([[3, 5, 0]])
    assert not table(ids).any()
    table(ids).sum().backward()
    assert table.weight.grad.any(1).nonzero().flatten().tolist() == [3, 5]


def test_padding_stays_zero_whatever_its_row_holds():
    table = WordTable(WordTableConfig(width=4))
    torch.nn.init.ones_(table.weight)
    assert table(torch.tensor([[3, 0]])).tolist() == [[[1, 1, 1, 1], [0, 0, 0, 0]]]


def test_word_ids_need_a_table_and_embeddings_pass_through():
    net = Denoiser(NANO)
    with pytest.raises(ValueError, match="no word table"):
        net.embed(torch.zeros(1, 3, dtype=torch.int64))
    embeddings = torch.randn(1, 3, 8)
    assert torch.equal(net.embed(embeddings), embeddings)
    with pytest.raises(ValueError, match=r"words\.width=16 must equal"):
        Denoiser(NANO, WordTableConfig(width=16))
