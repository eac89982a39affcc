-- Applies 1..n transitions (starts are transitions from nowhere), each wholly or not at all.
--
-- KEYS   the meta and the log of each partition touched, in pairs. Instance keys are built from the meta's prefix, so
--        they lie in the same slot; declaring each costs 16 % (measured). So is the key of the deadlines (due), a sorted
--        set of "machine:id" by ms, which machines without timeouts never touch.
-- ARGV 1 MessagePack, a stream of values (a table for each item would cost 1 us of it, and one for the call of a single item
--        as much as its XADD); or, where they are thousands, one array of them:
--        - the number of moves; for each machine, event, machine version (text), {state: ms that it may last} or false, how
--          many pairs of states follow, and these pairs: from, to. A start's from is ""
--        - the number of shapes; for each how many field names follow, and these: most items of a call have one in common
--        - items to the end: partition index, id, move index, token, tail, shape index, then the texts of the shape's fields. A
--          negative shape index is followed by two values more, before the texts: expected version or 0, and [the version up
--          to which a repetition was not applied, -1 for no repetition, watermark at which SQL had no such instance or "",
--          [unset field, ...], [[field, delta, i|f], ...], token of a claim or ""]. The tail is the entry's text from
--          transition id to unset
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
local values = { unpacked(ARGV[1]) }
if not values[2] then values = values[1] end
local last = #values
local several = last > 60 -- a few items: less is not worth remembering anything for the next item
local here = ARGV[2] == '1' and identity()
local time = call('TIME')
local at = time[1] .. sub('00000' .. time[2], -6, -4)
local fields_max = tonumber(ARGV[3])
-- An instance with more data fields than this has the flag w. Of one without it nothing has to be counted before a patch that
-- could not bring it over the limit: to count costs each item 6 % of its time.
local NARROW_MAX = 64
--@include apply_lone

-- Tables are made with a place for their first element: one that grows to it costs a single call as much as its TIME.
-- Of each move: 1 to 4 texts that its items have in common (of the key, the entry's begin and end, the end of `@`); 5, by the state
-- that it comes from, what those items have in common; 6 the event; 7 the deadlines; 8 and 9 where its pairs begin and end.
local moves, timed, behind = { false }, false, 2
for n = 1, values[1] do
  local machine, event, version, deadlines = values[behind], values[behind + 1], values[behind + 2], values[behind + 3]
  local pairs_end = behind + 4 + 2 * values[behind + 4]
  timed = timed or deadlines
  moves[n] = {
    machine .. ':', machine .. '\31', '\31\31' .. version, ' ' .. version .. ' ' .. at, several and {}, event, deadlines, behind + 5,
    pairs_end,
  }
  behind = pairs_end + 1
end
--@include shapes
-- Only what every call needs is read at once; what a refusal depends on (brake, cold) is read when it comes to that.
local refused, metas, logs, prefixes, rooms = { false }, { '' }, { '' }, { '' }, { 0 }
for p = 1, #KEYS / 2 do
  local meta, log = KEYS[2 * p - 1], KEYS[2 * p]
  local m = call('HMGET', meta, 'epoch', 'owner', 'status', 'limit', 'kept')
  refused[p] = ((m[1] ~= EPOCH or m[2] ~= OWNER) and 'EPOCH') or (m[3] ~= 'ready' and 'RECOVERING')
    or (here and call('HGET', meta, 'identity') ~= here and 'IDENTITY')
  metas[p], logs[p], prefixes[p] = meta, log, sub(meta, 1, -5) .. 'i:'
  rooms[p] = (m[4] or 0) - call('XLEN', log) + (m[5] or 0)
  if timed then call('ZCARD', sub(meta, 1, -5) .. 'due') end -- no sorted set: fails here, before the first write
end

--@include apply_rare
local lines, count = { at, nil }, 1
--@include apply_item
return table.concat(lines, '\n')
