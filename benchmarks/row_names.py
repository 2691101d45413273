"""What files are called that keep a row of a benchmark; the documentation reads them, too."""


def slug(name: str) -> str:
    """Return a row's name as files carry it."""
    return name.replace(" ", "-").replace(",", "").replace("%", "").replace("'", "").replace("/", "-")
