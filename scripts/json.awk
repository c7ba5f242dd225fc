# Flattens one JSON document for shell scripts that cannot count on jq: one line per value, its path, a tab, the
# value. Strings come unescaped, but line breaks, tabs and control characters in them as spaces; \u escapes beyond
# ASCII become `?`. Trusts its input to be JSON.
#
#   {"a":[{"b":1},"x"]}   ->   a.0.b<TAB>1
#                              a.1<TAB>x

{ text = text $0 "\n" }

END {
    at = 1
    value("")
}

function blank() {
    while (substr(text, at, 1) ~ /[ \t\r\n]/ && at <= length(text)) at++
}

function value(path,    c, start) {
    blank()
    c = substr(text, at, 1)
    if (c == "{") object(path)
    else if (c == "[") array(path)
    else if (c == "\"") print path "\t" string()
    else {
        match(substr(text, at, 64), /^[^],} \t\r\n]+/)
        print path "\t" substr(text, at, RLENGTH)
        at += RLENGTH > 0 ? RLENGTH : length(text)
    }
}

function object(path,    key) {
    at++
    for (blank(); substr(text, at, 1) != "}" && at <= length(text); blank()) {
        if (substr(text, at, 1) == ",") { at++; blank() }
        key = string()
        blank()
        at++ # the colon
        value(path == "" ? key : path "." key)
    }
    at++
}

function array(path,    n) {
    at++
    for (blank(); substr(text, at, 1) != "]" && at <= length(text); blank()) {
        if (substr(text, at, 1) == ",") at++
        value(path "." n++ + 0)
    }
    at++
}

function string(    out, c) {
    at++
    while ((c = substr(text, at, 1)) != "\"" && at <= length(text)) {
        if (c == "\\") {
            at++
            c = substr(text, at, 1)
            if (c == "u") {
                c = unicode(substr(text, at + 1, 4))
                at += 4
            } else if (c ~ /[nrtbf]/) c = " "
        }
        out = out c
        at++
    }
    at++
    return out
}

function unicode(hex,    n, i) {
    for (i = 1; i <= 4; i++) n = n * 16 + index("0123456789abcdef", tolower(substr(hex, i, 1))) - 1
    return n < 32 ? " " : n < 127 ? sprintf("%c", n) : "?"
}
