"""llguidance's error texts in this API's words. They may contain parts of the request and options that clients don't have."""

from __future__ import annotations

import re

_SCHEMA = (
    (
        "oneOf constraints are not supported",
        "the branches of oneOf can't be told apart, so more than one could match. Use anyOf, or give each branch a type of its "
        "own or a required property with a const text of its own.",
    ),
    ("patternProperty regexes", "the patterns of patternProperties overlap. Let each key match at most one."),
    (
        "min/maxProperties only supported",
        "minProperties and maxProperties can only be enforced where all properties are required. Leave them out.",
    ),
    (
        "Unable to determine if regex is empty",
        "the patterns, formats and lengths of this text can't be enforced together. Use one of them, or combine them in one "
        "pattern.",
    ),
    ("Unsatisfiable schema: .* is greater than", "no value satisfies it: a lower limit exceeds an upper one."),
    ("incompatible types", "no value satisfies it: its parts ask for different types."),
    ("Regex is empty", "no value satisfies it: its pattern, format and lengths exclude one another."),
    ("required property .* is unsatisfiable", "no value satisfies it, but the property is required."),
    ("Unsatisfiable schema", "no value satisfies it."),
    ("Failed to generate regex for", "no number that can be written lies between its bounds, or they are too far out."),
    ("multiple of|'multipleOf'", "multipleOf: this value can't be enforced. Use another one, or leave it out."),
    (
        "is not present in a registry",
        "$schema or $ref names a document that is not known here. Leave it out, or use $defs.",
    ),
    ("Pointer .* does not exist|[Aa]nchor", "$ref: nothing is where it points. Correct it, or add the definition."),
    ("lookarounds not supported", "pattern: \\b and other look-around can't be enforced. Write it without."),
)
_MALFORMED = re.compile(r"^(?P<word>\$?[A-Za-z]+) must be |^Expected [a-z0-9 ]+ for '(?P<name>\$?[A-Za-z]+)'")
TYPE = "type: must be null, boolean, integer, number, string, array or object, or a list of these. Correct it."

_LARK = (
    ("lexer error", "unexpected character. Texts stand in double quotes, regular expressions between slashes."),
    ("no start rule", "there is no rule `start`. Add it."),
    ("Empty grammar", "it is empty."),
    ("unknown grammar", "@ refers to another grammar, which there is none. Remove it."),
    ("duplicate", "a rule that is defined twice. Rename one."),
    ("circular reference", "a terminal that refers to itself. Make it a rule, in small letters."),
    ("Unknown common regex", "%import: only the terminals of `common` can be imported. Define it here."),
    ("[Tt]oken range", "a token id outside the vocabulary. Correct it."),
    ("not supported", "a feature of Lark that can't be enforced (priorities, templates). Write it without."),
    ("too deeply nested", "nested too deeply. Split it into rules."),
)
_PLACE = re.compile(r"^(?:at )?(\d+)\(\d+\): ")
_UNDEFINED = re.compile(r'unknown name: "([\w-]{1,100})"')
_REGEX = re.compile(r"\nerror: ([^\n]{1,200})")
_TOO_COMPLEX = re.compile(r"too (large|big|many|complex)|fuel|limit", re.IGNORECASE)
_NO_OUTPUT = "no output satisfies it. Check for rules that lead back to themselves without end."


def schema_message(error: str) -> str:
    """The message for a schema that llguidance refuses."""
    if (reason := _REGEX.search(error)) is not None:
        return f"pattern: {reason[1]}. Correct it."
    for sign, message in _SCHEMA:
        if re.search(sign, error):
            return message
    if error.startswith(("type must be", "Invalid type")):
        return TYPE
    if (malformed := _MALFORMED.search(error)) is not None:
        return f"{malformed['word'] or malformed['name']}: a value of the wrong type. Correct it."
    if _TOO_COMPLEX.search(error):
        return "too large when its references and combinations are written out. Simplify it."
    return "no value satisfies it." if "NoExtension" in error else "can't be enforced. Simplify it."


def grammar_message(error: str, *, places: bool) -> str:
    """The message for a regular expression or a grammar that llguidance refuses.

    Args:
      places: say the line; a client can't use that of a text that it did not write.
    """
    place = _PLACE.search(error) if places else None
    where = "" if place is None else f"line {place[1]}: "
    if (reason := _REGEX.search(error)) is not None:
        return f"{where}invalid regular expression: {reason[1]}. Correct it."
    if "lookarounds not supported" in error:
        return f"{where}\\b and other look-around can't be enforced. Write it without."
    if (name := _UNDEFINED.search(error)) is not None:
        return f"{where}{name[1]} is not defined. Add it; a terminal, in capitals, can't refer to rules."
    for sign, message in _LARK:
        if re.search(sign, error):
            return where + message
    if "Expected " in error:
        return f"{where}the grammar's syntax is wrong here. Correct it."
    if _TOO_COMPLEX.search(error):
        return f"{where}too large when its repetitions and references are written out. Simplify it."
    return _NO_OUTPUT if "NoExtension" in error else f"{where}can't be enforced. Simplify it."
