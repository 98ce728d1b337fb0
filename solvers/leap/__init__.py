"""D-Wave: the Leap service's hybrid solvers and its quantum processors. Needs the extra ``dwave`` and an account.

    Problem ──RemoteForm──▶ model file ──Connection──▶ the service ──Job──▶ answer ──RemoteForm──▶ choices ──▶ Solution

What always holds: nothing is sent unless one of these solvers is named; before anything is sent its size is compared
with what the service publishes; a `Job` file is written before the upload, and names what was sent by a label of its
own, so that a broken connection or a killed process loses no problem and never submits one twice; tokens are taken
from where D-Wave's client takes them and go nowhere else, its own log included.
"""
