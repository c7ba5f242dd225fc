//! A Sandbar task in Zig, as an ordinary program: input on stdin, output on stdout, log on stderr.

const std = @import("std");
const File = std.Io.File;

const Input = struct { text: []const u8 };
const Stats = struct { lines: usize, words: usize, longest: []const u8 };

pub fn main(init: std.process.Init) !void {
    const arena = init.arena.allocator();

    var in_buffer: [4096]u8 = undefined;
    var stdin = File.stdin().readerStreaming(init.io, &in_buffer);
    const bytes = try stdin.interface.allocRemaining(arena, .unlimited);

    const input = std.json.parseFromSliceLeaky(Input, arena, bytes, .{ .ignore_unknown_fields = true }) catch |err| {
        std.log.err("input: {t}", .{err});
        std.process.exit(1);
    };
    const stats = count(input.text);
    std.log.info("counted the words words={d}", .{stats.words});

    var out_buffer: [4096]u8 = undefined;
    var stdout = File.stdout().writerStreaming(init.io, &out_buffer);
    try std.json.Stringify.value(stats, .{}, &stdout.interface);
    try stdout.interface.flush();
}

fn count(text: []const u8) Stats {
    var stats: Stats = .{ .lines = std.mem.countScalar(u8, text, '\n'), .words = 0, .longest = "" };
    // The last line counts whether or not it ends with a line feed.
    if (text.len > 0 and text[text.len - 1] != '\n') stats.lines += 1;
    var words = std.mem.tokenizeAny(u8, text, " \t\r\n");
    while (words.next()) |word| {
        stats.words += 1;
        if (word.len > stats.longest.len) stats.longest = word; // the first of equals
    }
    return stats;
}

test "the longest word is the first of equals" {
    const stats = count("one two\nthree seven\n");
    try std.testing.expectEqual(2, stats.lines);
    try std.testing.expectEqual(4, stats.words);
    try std.testing.expectEqualStrings("three", stats.longest);
}
