"""Literals of conditions for MariaDB: what is too large is refused before it is written out."""

import pytest

from connectors.mariadb import selection
from connectors.portable import Kind


@pytest.mark.parametrize("literal", ["1e999999999", "-1e99999999", "1e-99999999", "0e999999999"])
def test_a_number_is_not_written_out_with_a_thousand_million_digits(literal):
    with pytest.raises(ValueError, match=r"^$"):
        selection._READ[Kind.DECIMAL](literal)


def test_numbers_that_the_server_has_are_read():
    read = selection._READ[Kind.DECIMAL]
    assert read("-12.50") == ("CAST(%s AS DECIMAL(65,2))", "-12.50")
    assert read("1e3") == ("CAST(%s AS DECIMAL(65,0))", "1000")
