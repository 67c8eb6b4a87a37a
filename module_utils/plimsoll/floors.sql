-- What detection takes of the tables samples and rollups, of one host or of a whole fleet: a row is the smallest sample
-- of a process in so many seconds as the view resolution has in its one row, the earliest of several, with how many
-- there were; and where a process has no sample in ten minutes, its rollup, as of their middle. timestamp in Unix
-- seconds, size_kb in KiB of rss + swap; tasks and start_time are null where they are not known. A process that is
-- ending holds nothing, and is left out. Standard SQL, as DuckDB and Spark have it both.
WITH floors AS (
    SELECT host, unit, pid, start_time, command, role,
           min_by(timestamp, (size_kb, timestamp)) AS timestamp,
           min(size_kb) AS size_kb,
           -- DuckDB's min_by passes over nulls: it would take another sample's tasks.
           nullif(min_by(coalesce(tasks, -1), (size_kb, timestamp)), -1) AS tasks,
           count(*) AS count
    FROM (
        SELECT host, unit, pid, start_time, role, timestamp, tasks, rss_kb + coalesce(swap_kb, 0) AS size_kb,
               floor(timestamp / seconds) AS stretch,
               -- It stands for the worker where there is no unit; else it may be another one for each task.
               CASE WHEN unit = '' THEN command ELSE '' END AS command
        FROM samples CROSS JOIN resolution
    ) AS sized
    WHERE size_kb > 0
    GROUP BY host, unit, pid, start_time, command, role, stretch
)
SELECT host, unit, pid, start_time, command, role, timestamp, size_kb, tasks, count
FROM floors
UNION ALL
SELECT host, unit, pid, start_time, '' AS command, role, timestamp + 300 AS timestamp, floor_kb AS size_kb, tasks,
       coalesce(count, 1) AS count
FROM rollups
WHERE floor_kb > 0 AND NOT EXISTS (
    SELECT 1
    FROM floors
    WHERE floors.host = rollups.host AND floors.unit = rollups.unit AND floors.pid = rollups.pid
      AND coalesce(floors.start_time, -1) = coalesce(rollups.start_time, -1)
      AND floor(floors.timestamp / 600) = floor(rollups.timestamp / 600)
)
