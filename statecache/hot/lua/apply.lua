-- Applies 1..n transitions (starts are transitions from nowhere), each wholly or not at all.
--
-- KEYS   the meta and the log of each partition touched, in pairs. Instance keys are built from the meta's prefix, so
--        they lie in the same slot; declaring each costs 16 % (measured). So is the key of the deadlines (due), a sorted
--        set of "machine:id" by ms, which machines without timeouts never touch.
-- ARGV 1 [items, moves, shapes] in MessagePack. Items are one flat array (a table for each item would cost 1 us of it): for
--        each partition index, id, move index, token, tail, shape index, then the texts of the shape's fields. A shape is an
--        array of field names: most items of a call have one in common. A negative shape index is followed by two parts more,
--        before the texts: expected version or 0, and [retry 0|1, watermark at which SQL had no such instance or "",
--        [unset field, ...], [[field, delta, i|f], ...], token of a claim or ""].
--        The tail is the entry's text from transition id to unset. Moves are arrays of [machine, event, {from: to}, machine
--        version (text), {state: ms that it may last} or absent]; a start's from is ""
--      2 '1': compare the server's identity first
--      3 data fields that an instance may have
--
-- Reply  one string. First line: time in ms. Then a line per item:
--   OK version entry_id from to     written (from is - for a start)
--   DUP version entry_id            this transition id is in the ring; the ring was written again, nothing else changed
--                                   (entry_id is - when the id stands for an older version)
--   OLD version                     a repetition, and the ring has dropped ids: look in history. The ring was written
--                                   again, nothing else changed
--   MISS cold evicted_to            not hot; cold is 0 when nothing of the partition is cold. Nothing written
--   EXISTS version                  a start found it. Nothing written
--   STATE state version             no such move from this state. Nothing written
--   VERSION version                 not the expected one. Nothing written
--   FULL                            the backlog has reached its limit. Nothing written
--   PARKED                          waits behind a dead letter. Nothing written
--   FENCED worker until             a claim keeps it out: somebody else's, or its own is no longer in force (worker is -
--                                   and until 0, or the end of that one, when nobody holds the instance). Nothing written
--   DATA rule field                 an increment or the number of fields breaks a rule. Nothing written
--   TYPE                            the instance's key is not a hash of ours. Nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted. Nothing written
-- Cost   8-10 us of server time an item in batches: HMGET, XADD, HSET.
--@include identity
--@include unpacked
local call, pcall_, find, sub, match = redis.call, redis.pcall, string.find, string.sub, string.match
local packed = unpacked(ARGV[1])
local items, moves, shapes = packed[1], packed[2], packed[3]
local here = ARGV[2] == '1' and identity()
local time = call('TIME')
local at = time[1] .. string.format('%03d', math.floor(time[2] / 1000))

local last = #items
local several = last > 40 -- values, of a few items: less is not worth remembering anything for the next item
-- Texts that all items of a move have in common: of its key, the entry's begin and end, the end of `@`; and, by the state that
-- it comes from, those of the move (see `apply`). In tables that are made at once: one that grows costs a single call too much.
local timed, common = false, { false }
for n = 1, #moves do
  local move = moves[n]
  timed = timed or move[5]
  common[n] = { move[1] .. ':', move[1] .. '\31', '\31\31' .. move[4], ' ' .. move[4] .. ' ' .. at, {} }
end
-- Only what every call needs is read at once; what a refusal depends on (brake, cold) is read when it comes to that.
local refused, metas, logs, prefixes, rooms = {}, {}, {}, {}, {}
for p = 1, #KEYS / 2 do
  local meta, log = KEYS[2 * p - 1], KEYS[2 * p]
  local m = call('HMGET', meta, 'epoch', 'owner', 'status', 'limit', 'kept')
  refused[p] = ((m[1] ~= EPOCH or m[2] ~= OWNER) and 'EPOCH') or (m[3] ~= 'ready' and 'RECOVERING')
    or (here and call('HGET', meta, 'identity') ~= here and 'IDENTITY')
  metas[p], logs[p], prefixes[p] = meta, log, sub(meta, 1, -5) .. 'i:'
  rooms[p] = (m[4] or 0) - call('XLEN', log) + (m[5] or 0)
  if timed then call('ZCARD', sub(meta, 1, -5) .. 'due') end -- no sorted set: fails here, before the first write
end

--@include apply_item
local lines, count = { at }, 1
while behind < last do
  count = count + 1
  lines[count] = apply(behind)
end
return table.concat(lines, '\n')
