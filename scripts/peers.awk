# Folds the figures of benches/peers ("name<TAB>value<TAB>unit") into one table with the goals of the project.
BEGIN { FS = "\t" }
# `known` beside `value`, which awk extends by whatever is asked for.
NF == 3 { known[$1] = 1; value[$1] = $2; unit[$1] = $3; order[++n] = $1 }

function has(name) { return name in known }
function max(a, b) { return a + 0 > b + 0 ? a : b }
function verdict(met) { return met ? "met" : "MISSED" }
function line(text, figure, measure, goal, met) {
    printf "| %-58s | %12s %-8s | %-34s | %-6s |\n", text, figure, measure, goal, met
}
# name, text
function figure(name, text) {
    if (!has(name)) return
    shown[name] = 1
    line(text, sprintf(value[name] < 100 ? "%.2f" : "%.0f", value[name]), unit[name], "", "")
}
# name, text, goal in words, whether it is met
function goal(name, text, words, met) {
    if (!has(name)) return
    shown[name] = 1
    line(text, sprintf(value[name] < 100 ? "%.2f" : "%.0f", value[name]), unit[name], words, verdict(met))
}
function ratio(text, over, under, words, least) {
    if (!has(over) || !has(under) || value[under] == 0) return
    line(text, sprintf("%.2f", value[over] / value[under]), "×", words, verdict(value[over] / value[under] >= least))
}
END {
    printf "| %-58s | %-21s | %-34s | %-6s |\n|---|---|---|---|\n", "", "figure", "goal", ""
    figure("drain.graphile", "drain, graphile-worker, batched no-ops")
    figure("drain.pgqueuer", "drain, pgqueuer, batch 1000 no-ops")
    figure("drain.sandbox", "drain, Sandbar, sandboxed runs of a trivial component")
    ratio("  of graphile-worker's", "drain.sandbox", "drain.graphile", "≥ 1", 1)
    goal("drain.native", "drain, Sandbar's queue, native no-op", "≥ 40,000 /s", value["drain.native"] >= 40000)
    goal("drain.wal", "WAL per job over its whole life", "≤ 1,229 B", value["drain.wal"] <= 1229)
    figure("single.graphile", "single enqueues, 64 callers, graphile-worker")
    figure("single.pgqueuer", "single enqueues, 64 callers, pgqueuer")
    goal("single.http", "single enqueues, 64 keep-alive callers, Sandbar over HTTP", "≥ 15,000 /s", value["single.http"] >= 15000)
    best = max(value["single.graphile"], value["single.pgqueuer"])
    if (best > 0) { known["single.best"] = 1; value["single.best"] = best; shown["single.best"] = 1 }
    ratio("  of the best peer's", "single.http", "single.best", "≥ 5", 5)
    figure("batch.graphile", "batches of 1,000, graphile-worker")
    figure("batch.pgqueuer", "batches of 1,000, pgqueuer")
    goal("batch.store", "batches of 1,000, Sandbar's queue", "≥ 60,000 /s", value["batch.store"] >= 60000)
    goal("batch.http", "batches of 1,000, Sandbar over HTTP", "≥ 60,000 /s", value["batch.http"] >= 60000)
    split("20 200 2000", rates, " ")
    for (i = 1; i <= 3; i++) {
        r = rates[i]
        figure("start.raw.p50." r, "raw single-row commit beside " r "/s, p50")
        figure("start.raw.p99." r, "raw single-row commit beside " r "/s, p99")
        figure("start.graphile.p50." r, "enqueue to first line, graphile-worker, " r "/s, p50")
        figure("start.graphile.p99." r, "enqueue to first line, graphile-worker, " r "/s, p99")
        figure("start.pgqueuer.p50." r, "enqueue to first line, pgqueuer, " r "/s, p50")
        figure("start.pgqueuer.p99." r, "enqueue to first line, pgqueuer, " r "/s, p99")
        if (r == 200) {
            goal("start.sandbox.p50.200", "enqueue to first guest instruction, 200/s, p50", "≤ 2 ms", value["start.sandbox.p50.200"] <= 2)
            limit = value["start.raw.p99.200"] + 3
            goal("start.sandbox.p99.200", "enqueue to first guest instruction, 200/s, p99", sprintf("≤ raw commit's p99 + 3 = %.2f ms", limit), value["start.sandbox.p99.200"] <= limit)
        } else {
            figure("start.sandbox.p50." r, "enqueue to first guest instruction, " r "/s, p50")
            figure("start.sandbox.p99." r, "enqueue to first guest instruction, " r "/s, p99")
        }
    }
    goal("fair.last", "1,000 tenants, one with 100k: the last of the 999 starts", "≤ 0.3 s", value["fair.last"] <= 0.3)
    figure("fair.rate", "  rate meanwhile")
    figure("fair.fifo", "  rate of one tenant with as many")
    ratio("  of FIFO's", "fair.rate", "fair.fifo", "≥ 0.9", 0.9)
    goal("weights.equal", "weights 1:2:4, equal costs: largest deviation of CPU share", "≤ 5 %", value["weights.equal"] <= 5)
    goal("weights.unequal", "weights 1:2:4, costs 4:2:1: largest deviation of CPU share", "≤ 5 %", value["weights.unequal"] <= 5)
    figure("deep.claim.10k", "claim of 100, 10k queued, p50")
    goal("deep.claim.1M", "claim of 100, 1M queued, p50", "≤ 2 × of 10k", value["deep.claim.1M"] <= 2 * value["deep.claim.10k"])
    figure("snapshot.none", "native drain, no old snapshot")
    figure("snapshot.held", "native drain, a snapshot held from before it to its end")
    ratio("  of the rate without it", "snapshot.held", "snapshot.none", "≥ 0.9", 0.9)
    for (i = 1; i <= n; i++) if (!(order[i] in shown)) figure(order[i], order[i])
}
