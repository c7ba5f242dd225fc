//! The tree: quota, names, links, and no way out.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn tree() -> Tree {
    Tree::new(MIB, 100, Some(7))
}

fn create(tree: &mut Tree, path: &str) -> Id {
    tree.open(ROOT, path, Open { create: true, ..Open::default() }).unwrap()
}

fn names(tree: &Tree, id: Id) -> Vec<String> {
    tree.entries(id, 0).unwrap().map(|(_, name, ..)| name.to_owned()).collect()
}

#[test]
fn what_is_written_is_read_and_holes_are_zero() {
    let mut tree = tree();
    let id = create(&mut tree, "f");
    tree.write(id, 10_000, b"tail").unwrap();
    tree.write(id, 0, b"head").unwrap();
    let mut bytes = vec![9; 20_000];
    assert_eq!(tree.read(id, 0, &mut bytes), Ok(10_004));
    assert_eq!((&bytes[..4], &bytes[10_000..10_004]), (&b"head"[..], &b"tail"[..]));
    assert!(bytes[4..10_000].iter().all(|b| *b == 0));
    assert!(tree.used() < 10_000, "a hole costs next to nothing: {}", tree.used());
    assert_eq!(tree.read(id, u64::MAX, &mut bytes), Ok(0));
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let mut tree = tree();
    let id = create(&mut tree, "f");
    tree.write(id, 0, &[1; 9_000]).unwrap();
    tree.set_size(id, 100).unwrap();
    tree.set_size(id, 9_000).unwrap();
    let mut bytes = vec![9; 9_000];
    tree.read(id, 0, &mut bytes).unwrap();
    assert!(bytes[..100].iter().all(|b| *b == 1) && bytes[100..].iter().all(|b| *b == 0));
}

#[test]
fn no_path_leads_out() {
    let mut tree = tree();
    tree.make_directory(ROOT, "d").unwrap();
    let d = tree.open(ROOT, "d", Open { directory: true, ..Open::default() }).unwrap();
    tree.make_link(ROOT, "d/up", "..").unwrap();
    tree.make_link(ROOT, "d/far", "../../../etc").unwrap();
    tree.make_link(ROOT, "d/abs", "/etc/passwd").unwrap();
    for (base, path) in [
        (ROOT, ".."),
        (ROOT, "/etc/passwd"),
        (ROOT, "d/../../x"),
        (ROOT, "d/far/passwd"),
        (d, ".."),
        (d, "../f"),
        (d, "up/f"),
        (d, "abs"),
    ] {
        assert_eq!(tree.find(base, path, true), Err(Fault::Outside), "{path}");
    }
    assert_eq!(tree.find(ROOT, "d/up/d", true), Ok(d), "within the root it may go up");
    assert_eq!(tree.find(ROOT, "d/abs", true), Err(Fault::NotFound), "the tree's own root, which has no etc");
}

#[test]
fn links_in_a_circle_end() {
    let mut tree = tree();
    tree.make_link(ROOT, "a", "b").unwrap();
    tree.make_link(ROOT, "b", "a").unwrap();
    assert_eq!(tree.find(ROOT, "a", true), Err(Fault::Loop));
    assert_eq!(tree.find(ROOT, "a/x", false), Err(Fault::Loop));
    assert!(tree.find(ROOT, "a", false).is_ok());
    tree.remove_file(ROOT, "a").unwrap();
}

#[test]
fn an_open_file_outlives_its_name_and_is_given_back_when_closed() {
    let mut tree = tree();
    let before = tree.used();
    let id = create(&mut tree, "f");
    tree.write(id, 0, &[1; 5_000]).unwrap();
    tree.remove_file(ROOT, "f").unwrap();
    let mut bytes = [0; 1];
    assert_eq!(tree.read(id, 0, &mut bytes), Ok(1));
    assert!(tree.used() > 5_000);
    tree.close(id);
    assert_eq!(tree.used(), before);
    assert_eq!(tree.read(id, 0, &mut bytes), Err(Fault::NotFound));
}

#[test]
fn a_directory_that_was_removed_takes_nothing_in() {
    let mut tree = tree();
    tree.make_directory(ROOT, "d").unwrap();
    let d = tree.open(ROOT, "d", Open { directory: true, ..Open::default() }).unwrap();
    tree.remove_directory(ROOT, "d").unwrap();
    let before = tree.used();
    assert_eq!(tree.make_directory(d, "x"), Err(Fault::NotFound));
    create(&mut tree, "f");
    assert_eq!(tree.rename((ROOT, "f"), (d, "f")), Err(Fault::NotFound));
    tree.remove_file(ROOT, "f").unwrap();
    assert!(tree.used() >= before);
}

#[test]
fn a_rename_replaces_only_its_like_and_never_moves_a_directory_into_itself() {
    let mut tree = tree();
    tree.make_directory(ROOT, "a").unwrap();
    tree.make_directory(ROOT, "a/b").unwrap();
    let f = create(&mut tree, "f");
    assert_eq!(tree.rename((ROOT, "a"), (ROOT, "a/b/c")), Err(Fault::Invalid));
    assert_eq!(tree.rename((ROOT, "a"), (ROOT, "f")), Err(Fault::NotDirectory));
    assert_eq!(tree.rename((ROOT, "f"), (ROOT, "a")), Err(Fault::IsDirectory));
    tree.make_directory(ROOT, "c").unwrap();
    assert_eq!(tree.rename((ROOT, "c"), (ROOT, "a")), Err(Fault::NotEmpty));
    tree.rename((ROOT, "f"), (ROOT, "a/b/f")).unwrap();
    assert_eq!(tree.find(ROOT, "a/b/f", true), Ok(f));
    tree.rename((ROOT, "a"), (ROOT, "c")).unwrap();
    assert_eq!(tree.find(ROOT, "c/b/f", true), Ok(f));
    assert_eq!(names(&tree, ROOT), ["c"]);
    assert_eq!(tree.rename((ROOT, "c"), (ROOT, "c/b/x")), Err(Fault::Invalid), "parents are kept up to date");
}

#[test]
fn a_reader_that_removes_what_it_reads_misses_nothing() {
    let mut tree = tree();
    for n in 0..20 {
        create(&mut tree, &format!("f{n}"));
    }
    let mut from = 0;
    let mut seen = 0;
    loop {
        let next =
            tree.entries(ROOT, from).unwrap().next().map(|(serial, name, ..)| (serial, name.to_owned()));
        let Some((serial, name)) = next else { break };
        tree.remove_file(ROOT, &name).unwrap();
        from = serial + 1;
        seen += 1;
    }
    assert_eq!((seen, names(&tree, ROOT).len()), (20, 0));
}

#[test]
fn bytes_and_nodes_run_out_with_their_own_words() {
    let mut tree = Tree::new(64 << 10, 4, None);
    let id = create(&mut tree, "f");
    assert_eq!(tree.write(id, 0, &vec![1; 63 << 10]), Err(Fault::NoSpace), "all of it or nothing");
    assert_eq!(tree.stat(id).unwrap().size, 0);
    tree.write(id, 0, &vec![1; 40 << 10]).unwrap();
    assert_eq!(tree.write(id, 1 << 40, b"x"), Err(Fault::TooBig));
    assert_eq!(tree.set_size(id, u64::MAX), Err(Fault::TooBig));
    for n in 0..3 {
        tree.make_directory(ROOT, &format!("d{n}")).unwrap();
    }
    assert_eq!(tree.make_directory(ROOT, "d3"), Err(Fault::NoNodes));
    tree.remove_directory(ROOT, "d0").unwrap();
    tree.make_directory(ROOT, "d3").unwrap();
}

#[test]
fn a_very_deep_tree_is_made_walked_and_dropped() {
    let mut tree = Tree::new(64 * MIB, 8_000, None);
    let mut here = ROOT;
    for _ in 0..7_000 {
        tree.make_directory(here, "d").unwrap();
        here = tree.open(here, "d", Open { directory: true, ..Open::default() }).unwrap();
    }
    assert_eq!(tree.find(here, "../..", true), Err(Fault::Outside));
    let scratch = super::super::collect(&tree, &["**/x".to_owned()], MIB);
    assert!(scratch.files.is_empty());
}

/// One step of a hostile program.
#[derive(Debug, Clone)]
enum Step {
    Create(u8),
    Directory(u8),
    Link(u8, u8),
    Hard(u8, u8),
    Write(u8, u32, u16),
    Size(u8, u32),
    Remove(u8),
    Rename(u8, u8),
    Close(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<u8>().prop_map(Step::Create),
        any::<u8>().prop_map(Step::Directory),
        any::<(u8, u8)>().prop_map(|(a, b)| Step::Link(a, b)),
        any::<(u8, u8)>().prop_map(|(a, b)| Step::Hard(a, b)),
        any::<(u8, u32, u16)>().prop_map(|(a, b, c)| Step::Write(a, b % (1 << 18), c)),
        any::<(u8, u32)>().prop_map(|(a, b)| Step::Size(a, b % (1 << 18))),
        any::<u8>().prop_map(Step::Remove),
        any::<(u8, u8)>().prop_map(|(a, b)| Step::Rename(a, b)),
        any::<u8>().prop_map(Step::Close),
    ]
}

/// A path of up to three names, from a small set, so that steps meet.
fn path(n: u8) -> String {
    let names = ["a", "b", "c", ".."];
    let (first, second, third) = (n % 3, n / 4 % 4, n / 16 % 4);
    match n / 64 {
        0 => names[first as usize].to_owned(),
        1 => format!("{}/{}", names[first as usize], names[second as usize]),
        _ => format!("{}/{}/{}", names[first as usize], names[second as usize], names[third as usize]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn whatever_a_program_does_the_quota_holds_and_all_of_it_comes_back(
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let (quota, nodes) = (256 << 10, 20);
        let mut tree = Tree::new(quota, nodes, None);
        let mut open: Vec<Id> = Vec::new();
        for step in steps {
            match step {
                Step::Create(n) => {
                    open.extend(tree.open(ROOT, &path(n), Open { create: true, follow: true, ..Open::default() }));
                }
                Step::Directory(n) => { let _ = tree.make_directory(ROOT, &path(n)); }
                Step::Link(n, to) => { let _ = tree.make_link(ROOT, &path(n), &path(to)); }
                Step::Hard(n, to) => { let _ = tree.hard_link((ROOT, &path(n)), (ROOT, &path(to)), false); }
                Step::Write(n, at, len) if !open.is_empty() => {
                    let id = open[usize::from(n) % open.len()];
                    let _ = tree.write(id, u64::from(at), &vec![1; usize::from(len)]);
                }
                Step::Size(n, size) if !open.is_empty() => {
                    let _ = tree.set_size(open[usize::from(n) % open.len()], u64::from(size));
                }
                Step::Remove(n) => {
                    let _ = tree.remove_file(ROOT, &path(n)).or_else(|_| tree.remove_directory(ROOT, &path(n)));
                }
                Step::Rename(n, to) => { let _ = tree.rename((ROOT, &path(n)), (ROOT, &path(to))); }
                Step::Close(n) if !open.is_empty() => {
                    let id = open.swap_remove(usize::from(n) % open.len());
                    tree.close(id);
                }
                Step::Write(..) | Step::Size(..) | Step::Close(_) => {}
            }
            prop_assert!(tree.used() <= quota);
            let live = tree.nodes.iter().flatten().count() as u64 - 1;
            prop_assert_eq!(live + tree.left, nodes);
            let real: u64 = tree.nodes.iter().skip(1).flatten().map(|node| NODE_BYTES + match &node.body {
                Body::File { blocks, .. } => file_bytes(blocks),
                Body::Link(target) => target.len() as u64,
                Body::Directory { .. } => 0,
            }).sum::<u64>() + tree.nodes.iter().flatten().map(|node| match &node.body {
                Body::Directory { names, .. } => names.keys().map(|name| name_bytes(name)).sum::<u64>(),
                _ => 0,
            }).sum::<u64>();
            prop_assert_eq!(real, tree.used());
        }
        for id in open {
            tree.close(id);
        }
        // The deepest first: a directory goes when it is empty, so in as many rounds as there are nodes.
        for _ in 0..=nodes {
            let mut stack = vec![ROOT];
            while let Some(id) = stack.pop() {
                for name in names(&tree, id) {
                    let _ = tree.remove_file(id, &name).or_else(|_| tree.remove_directory(id, &name));
                }
                stack.extend(tree.entries(id, 0).unwrap().map(|(_, _, child, _)| child));
            }
        }
        prop_assert_eq!(tree.used(), 0);
        prop_assert_eq!(tree.left, nodes);
    }
}
