"""The table itself: what must be in it. Every other law would pass on an empty table."""

import rows


def test_the_first_presets_are_in_the_table():
    assert {"sam", "asam", "sam-groups", "sam-micro", "asam-micro"} <= {row.name for row in rows.ROWS}


def test_every_public_preset_has_a_row():
    import inspect

    public = {name for name, value in vars(rows.presets).items()
              if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == rows.presets.__name__}
    covered = {row.preset for row in rows.ROWS}
    assert public <= covered | {"table"}, f"presets without a row: {sorted(public - covered)}"


def test_names_are_unique():
    names = [row.name for row in rows._ALL]
    assert len(names) == len(set(names))
