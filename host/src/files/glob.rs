//! Patterns of paths. Owns matching, in time that grows with the product of the lengths, whatever they are.

/// Whether a path matches: `*` any characters of a name, `?` one of them, `**` as a name any directories.
pub(super) fn matches(pattern: &str, path: &str) -> bool {
    let names: Vec<&str> = path.split('/').collect();
    // Which numbers of leading names the pattern so far can stand for.
    let mut reached = vec![false; names.len() + 1];
    reached[0] = true;
    for part in pattern.split('/') {
        let mut next = vec![false; names.len() + 1];
        if part == "**" {
            let mut any = false;
            for (count, slot) in next.iter_mut().enumerate() {
                any |= reached[count];
                *slot = any;
            }
        } else {
            for (count, name) in names.iter().enumerate() {
                next[count + 1] = reached[count] && name_matches(part, name);
            }
        }
        reached = next;
    }
    reached[names.len()]
}

/// The usual two pointers: after a mismatch, go back to the latest star only.
fn name_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_and_directories() {
        for (pattern, path, wanted) in [
            ("a.txt", "a.txt", true),
            ("a.txt", "b/a.txt", false),
            ("*.txt", "a.txt", true),
            ("*.txt", "d/a.txt", false),
            ("out/*", "out/a", true),
            ("out/*", "out/a/b", false),
            ("**/*.txt", "a.txt", true),
            ("**/*.txt", "x/y/a.txt", true),
            ("out/**", "out/a/b", true),
            ("out/**/b", "out/b", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("**", "a/b/c", true),
        ] {
            assert_eq!(matches(pattern, path), wanted, "{pattern} {path}");
        }
    }

    #[test]
    fn many_stars_do_not_take_for_ever() {
        let pattern = format!("{}b", "*a".repeat(120));
        assert!(!matches(&pattern, &"a".repeat(250)));
    }
}
