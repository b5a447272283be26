"""The table itself: what must be in it. Every other law would pass on an empty table."""

import rows


def test_the_first_presets_are_in_the_table():
    assert {"sam", "asam", "sam-groups", "sam-micro", "asam-micro"} <= {row.name for row in rows.ROWS}


def test_every_public_preset_has_a_row():
    public = set(rows.presets.PRESETS)
    covered = {row.preset for row in rows.ROWS}
    assert len(public) >= 16 and public <= covered, f"presets without a row: {sorted(public - covered)}"


def test_a_preset_is_the_same_function_wherever_it_is_imported_from():
    import flatmin
    from flatmin.ascent import presets as made
    from flatmin.presets import sam

    assert flatmin.presets.sam is sam is made.sam
    assert set(flatmin.presets.__all__) == {*made.PRESETS, "PRESETS"}
    assert all(getattr(flatmin.presets, name) is function for name, function in made.PRESETS.items())


def test_names_are_unique():
    names = [row.name for row in rows._ALL]
    assert len(names) == len(set(names))
