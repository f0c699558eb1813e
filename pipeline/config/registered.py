"""Names of registered models that the registry takes: MLflow's own rules, known before anything is trained."""

import posixpath

MAX_LENGTH = 256
"""Of the column that holds them."""


def fault(name: str) -> str | None:
    """What is wrong with a registered model's name, and what would do; None for a good one.

    Example:
        >>> fault("cifar/student")
        'the registry takes no / and no : in a name; give such as cifar-student'
    """
    if not name.strip():
        return "the name is empty; give such as cifar100-student"
    if "/" in name or ":" in name:
        return f"the registry takes no / and no : in a name; give such as {name.replace('/', '-').replace(':', '-')}"
    if name != name.strip() or posixpath.normpath(name) != name or name == "." or name.startswith(".."):
        return "the registry takes no name that begins or ends with a space, is . or begins with .."
    if len(name) > MAX_LENGTH:
        return f"a name has at most {MAX_LENGTH} characters, this one {len(name)}"
    if not name.isprintable() or any(character in name for character in "'\"`%?#@"):
        # it becomes part of queries and of models:/<name>@<alias>
        return "quotes, %, ?, #, @ and control characters make models:/<name> ambiguous; use letters, digits, - and _"
    return None
